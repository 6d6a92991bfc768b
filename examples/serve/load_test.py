"""Offered load against answered load of serve_features.py, on loopback.

    python examples/serve/load_test.py http://127.0.0.1:8000 photos/ [--seconds 15] [--loads 0.5 1 2] [--pid PID]

Finds the capacity with a closed loop of 8 clients, then offers multiples of it at even intervals, whatever is answered
(an open loop: a slow answer delays no request). Every answered embedding is compared with the one that the service gave
for the same image before the load. Prints requests/s offered, answered and refused (503), p50 and p99 of the answered,
and with --pid the service's largest resident memory during the load.
"""

import argparse
import asyncio
import json
import resource
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np


async def post(url: str, body: bytes) -> tuple[int, Any]:
    """Status and JSON answer of one request on a connection of its own; 0 where the connection fails."""
    parts = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        lines = (
            f"POST {parts.path} HTTP/1.1",
            f"Host: {parts.netloc}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        writer.write("\r\n".join((*lines, "", "")).encode() + body)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        status, _, content = answer.partition(b"\r\n\r\n")
        return int(status.split()[1]), json.loads(content)
    except (OSError, IndexError, ValueError):
        return 0, None


def same(answer: Any, expected: np.ndarray) -> bool:
    """Whether an embedding is the expected one, but for the rounding of another batch's GEMMs."""
    got = np.array(answer["embedding"])
    return bool(np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected))


class Load:
    """What one load has been answered."""

    def __init__(self, url: str, images: list[bytes], expected: list[np.ndarray]) -> None:
        self.url, self.images, self.expected = url, images, expected
        self.seconds: list[float] = []
        self.refused = self.lost = self.wrong = 0

    async def request(self, number: int) -> None:
        index, begin = number % len(self.images), time.monotonic()
        status, answer = await post(self.url, self.images[index])
        if status == 503:
            self.refused += 1
        elif status != 200:
            self.lost += 1
        else:
            self.seconds.append(time.monotonic() - begin)
            self.wrong += not same(answer, self.expected[index])

    def line(self, name: str, offered: float, seconds: float, memory: str) -> str:
        p50, p99 = (1e3 * np.quantile(self.seconds, q) if self.seconds else float("nan") for q in (0.5, 0.99))
        rates = f"{offered:8.1f} {len(self.seconds) / seconds:9.1f} {self.refused / seconds:8.1f}"
        return f"{name:>8} {rates} {p50:8.0f} {p99:8.0f} {self.lost:5} {self.wrong:6} {memory:>9}"


async def closed(load: Load, seconds: float, clients: int = 8) -> None:
    end, numbers = time.monotonic() + seconds, iter(range(10**9))

    async def client() -> None:
        while time.monotonic() < end:
            await load.request(next(numbers))

    await asyncio.gather(*(client() for _ in range(clients)))


def opened(rate: float) -> Callable[[Load, float], Awaitable[None]]:
    async def offer(load: Load, seconds: float) -> None:
        begin, tasks = time.monotonic(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))
            tasks.append(asyncio.create_task(load.request(number)))
        await asyncio.gather(*tasks)

    return offer


async def peak_memory(pid: int | None, offered: Awaitable[None]) -> str:
    """Waits for a load; the service's largest resident memory meanwhile, sampled ten times a second."""
    loading, pages = asyncio.ensure_future(offered), 0
    while not loading.done():
        if pid is not None:
            pages = max(pages, int(Path(f"/proc/{pid}/statm").read_text().split()[1]))
        await asyncio.wait([loading], timeout=0.1)
    await loading
    return "-" if pid is None else f"{pages * resource.getpagesize() / 2**20:.0f} MiB"


async def run(asked: argparse.Namespace) -> int:
    url = asked.url.rstrip("/") + "/embed"
    images = [path.read_bytes() for path in sorted(Path(asked.images).iterdir()) if path.is_file()][:64]
    answers = [await post(url, image) for image in images]
    images = [image for image, (status, _) in zip(images, answers, strict=True) if status == 200]
    expected = [np.array(answer["embedding"]) for status, answer in answers if status == 200]
    if not images:
        raise SystemExit(f"{asked.images}: expected images that the service reads, got none")
    print("    load  offered answered/s refused/s  p50 ms   p99 ms  lost  wrong    memory")
    load = Load(url, images, expected)
    memory = await peak_memory(asked.pid, closed(load, asked.seconds))
    capacity = len(load.seconds) / asked.seconds
    print(load.line("8 clients", capacity, asked.seconds, memory), flush=True)
    failed = load.lost + load.wrong
    for multiple in asked.loads:
        load = Load(url, images, expected)
        memory = await peak_memory(asked.pid, opened(multiple * capacity)(load, asked.seconds))
        print(load.line(f"x {multiple:g}", multiple * capacity, asked.seconds, memory), flush=True)
        failed += load.lost + load.wrong
    return 1 if failed else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("images", help="a folder")
    parser.add_argument("--seconds", type=float, default=15, help="of each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1, 2], help="multiples of the capacity")
    parser.add_argument("--pid", type=int, help="of the service, to print its memory")
    raise SystemExit(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
