"""Features of images over HTTP: one process, one model, requests of any size in batches.

    pip install 'internvit[serve]'
    python examples/serve/serve_features.py --weights ./checkpoint --size 448 --port 8000
    curl --data-binary @photo.jpg localhost:8000/embed

    POST /embed     an image file -> {"embedding": [C], "height", "width"}; ?pooling=class (the default) or mean
    POST /patches   an image file -> every patch's unit vector, as the page at / compares them
    GET  /          a page: drop a picture, click on a patch, see its cosine similarity to all others
    GET  /healthz, /metrics

At most --queue requests are in the process at a time; one more is answered 503 with Retry-After, before its image is
read. Larger uploads than --max-bytes and images of more than --max-pixels get 413, what is not an image 400, an upload
that takes longer than --upload-seconds 408. SIGTERM ends it: accepted requests are answered for --shutdown-seconds, new
connections refused.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from internvit.data import Embedder

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Limits:
    """Attributes:
    queue: requests in the process at a time.
    batch: images of a forward pass.
    max_bytes: of an upload.
    max_pixels: of an image, before it is resized.
    upload_seconds: for a request's body.
    shutdown_seconds: from SIGTERM until requests that are still there are given up.
    """

    queue: int = 64
    batch: int = 8
    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000
    upload_seconds: int = 30
    shutdown_seconds: int = 60


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.answers = Counter("internvit_answers", "Answers by path and status", ["path", "status"], **own)
        self.waiting = Gauge("internvit_requests_in_process", "Accepted and not yet answered", **own)
        self.seconds = Histogram("internvit_seconds", "From a request's acceptance to its answer", ["path"], **own)
        self.batches = Histogram("internvit_batch_images", "Images of a call", buckets=(1, 2, 4, 8, 16, 32, 64), **own)


class Batcher:
    """Gathers what has arrived while the model ran into its next call; `Embedder` batches images of one size."""

    def __init__(self, embedder: Embedder, limits: Limits, metrics: Metrics) -> None:
        self.embedder, self.limits, self.metrics = embedder, limits, metrics
        self.arrived: asyncio.Queue[tuple[np.ndarray, asyncio.Future[Any]]] = asyncio.Queue()

    async def tokens(self, image: np.ndarray) -> np.ndarray:
        """The hidden states [1 + N, C] of an image from the embedder's `preprocess`."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.arrived.put_nowait((image, answer))
        return await answer

    async def run(self) -> None:
        while True:
            jobs = [await self.arrived.get()]
            while len(jobs) < self.limits.batch and not self.arrived.empty():
                jobs.append(self.arrived.get_nowait())
            self.metrics.batches.observe(len(jobs))
            try:
                results: list[Any] = await asyncio.to_thread(self.embedder.embed, [image for image, _ in jobs])
            except Exception as error:
                results = [error] * len(jobs)
            for (_, answer), result in zip(jobs, results, strict=True):
                if answer.done():  # its client has gone
                    continue
                if isinstance(result, dict):
                    answer.set_result(result["features"])
                elif isinstance(result, str):  # why this image has no features, such as values past float16's range
                    answer.set_exception(HTTPException(500, f"image: {result}"))
                else:
                    answer.set_exception(result)


class Service:
    """The answers to requests."""

    def __init__(self, embedder: Embedder, limits: Limits) -> None:
        self.embedder, self.limits, self.metrics = embedder, limits, Metrics()
        self.batcher = Batcher(embedder, limits, self.metrics)
        self.in_process = 0
        self.decoders = asyncio.Semaphore(4)

    @contextlib.asynccontextmanager
    async def accepted(self, path: str) -> AsyncIterator[None]:
        """A place in the process for one request.

        Raises:
            HTTPException: 503, there is none.
        """
        if self.in_process >= self.limits.queue:
            message = f"{self.limits.queue} requests are waiting already"
            raise HTTPException(503, message, headers={"Retry-After": "1"})
        self.in_process += 1
        begin = time.monotonic()
        try:
            with self.metrics.waiting.track_inprogress():
                yield
        finally:
            self.in_process -= 1
            self.metrics.seconds.labels(path).observe(time.monotonic() - begin)

    async def upload(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            HTTPException: 413, it is longer than `max_bytes`; 400, it is empty; 408, it is not here in time.
        """
        data = bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                data.extend(chunk)
                if len(data) > self.limits.max_bytes:
                    raise HTTPException(413, f"image: expected at most {self.limits.max_bytes} bytes, got more")

        try:
            await asyncio.wait_for(read(), self.limits.upload_seconds)
        except asyncio.TimeoutError as error:
            message = f"image: expected all bytes within {self.limits.upload_seconds} s, got {len(data)}"
            # Closed, so that the rest of the body does not arrive as the connection's next request.
            raise HTTPException(408, message, headers={"Connection": "close"}) from error
        if not data:
            raise HTTPException(400, "image: expected the bytes of an image file as the body, got none")
        return bytes(data)

    def decode(self, data: bytes) -> np.ndarray:
        """Pixels of an image file.

        Raises:
            HTTPException: 413, it has more than `max_pixels`; 400, it is not an image.
        """
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise HTTPException(413, f"image: expected at most {self.limits.max_pixels} pixels, got more") from error
        except Exception as error:
            raise HTTPException(400, f"image: expected an image file, got {type(error).__name__}") from error
        if width * height > self.limits.max_pixels:
            raise HTTPException(413, f"image: expected at most {self.limits.max_pixels} pixels, got {width} x {height}")
        try:
            return self.embedder.preprocess(data, "image")
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    async def tokens(self, request: Request) -> tuple[np.ndarray, int, int]:
        """Hidden states of the image in a request, and the height and width at which the model saw it."""
        data = await self.upload(request)
        async with self.decoders:
            image = await asyncio.to_thread(self.decode, data)
        return await self.batcher.tokens(image), image.shape[1], image.shape[2]

    async def embed(self, request: Request, pooling: str) -> dict[str, Any]:
        async with self.accepted("/embed"):
            tokens, height, width = await self.tokens(request)
        pooled = tokens[0] if pooling == "class" else tokens[1:].mean(0, dtype=np.float32)
        return {"embedding": pooled.tolist(), "pooling": pooling, "height": height, "width": width}

    async def patches(self, request: Request) -> dict[str, Any]:
        async with self.accepted("/patches"):
            tokens, height, width = await self.tokens(request)
        patch = self.embedder.config.patch_size
        vectors = tokens[1:] / np.maximum(np.linalg.norm(tokens[1:], axis=1, keepdims=True), 1e-12)
        encoded = base64.b64encode(vectors.astype("<f4").tobytes()).decode()
        return {"rows": height // patch, "columns": width // patch, "channels": vectors.shape[1], "vectors": encoded}


def application(embedder: Embedder, limits: Limits) -> FastAPI:
    """The ASGI application."""
    service = Service(embedder, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(service.batcher.run())
        yield
        running.cancel()

    app = FastAPI(title="InternViT features", lifespan=lifespan)

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        response = await call_next(request)
        route = request.scope.get("route")
        service.metrics.answers.labels(getattr(route, "path", "other"), response.status_code).inc()
        return response

    @app.post("/embed")
    async def embed(request: Request, pooling: str = Query("class", pattern="^(class|mean)$")) -> dict[str, Any]:
        return await service.embed(request, pooling)

    @app.post("/patches")
    async def patches(request: Request) -> dict[str, Any]:
        return await service.patches(request)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"model": embedder.source, "in_process": service.in_process}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text())

    return app


def main() -> None:
    limits = Limits()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="SOURCE", help="a checkpoint: folder, file or hub id")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="float32 by default, bfloat16 with --precision"
    )
    parser.add_argument("--precision", help="of the Linears, as optimize_for_inference takes it")
    parser.add_argument(
        "--size", default=None, metavar="PIXELS", help="side to resize to, or `image` for each one's own"
    )
    parser.add_argument("--device")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one")
    parser.add_argument("--queue", type=int, default=limits.queue, help="requests in the process at a time")
    parser.add_argument("--batch", type=int, default=limits.batch, help="images of a forward pass")
    parser.add_argument("--max-bytes", type=int, default=limits.max_bytes, help="of an upload")
    parser.add_argument("--max-pixels", type=int, default=limits.max_pixels, help="of an image")
    parser.add_argument("--upload-seconds", type=int, default=limits.upload_seconds, help="for a request's body")
    parser.add_argument(
        "--shutdown-seconds", type=int, default=limits.shutdown_seconds, help="for requests that SIGTERM finds"
    )
    asked = parser.parse_args()
    limits = Limits(**{field.name: getattr(asked, field.name) for field in fields(Limits)})
    for name, value in vars(limits).items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if asked.precision and asked.dtype not in (None, "bfloat16"):
        parser.error(f"--precision {asked.precision} computes in bfloat16, got --dtype {asked.dtype}")
    size = int(asked.size) if asked.size is not None and asked.size.isdecimal() else asked.size
    embedder = Embedder(
        asked.weights,
        dtype=asked.dtype or ("bfloat16" if asked.precision else "float32"),
        precision=asked.precision,
        size=size,
        device=asked.device,
        pooling="tokens",
        batch=asked.batch,
    )
    uvicorn.run(
        application(embedder, limits),
        host=asked.host,
        port=asked.port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )


if __name__ == "__main__":
    main()
