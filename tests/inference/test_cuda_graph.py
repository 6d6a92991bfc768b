"""`optimize_for_inference(cuda_graph=True)`: capture and replay on a stand-in for CUDA's graphs, and on a GPU."""

import contextlib
import copy
import pickle
import types
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import internvit
from internvit.inference.cuda_graph import WARM_UPS, GraphedFunction
from internvit.inference.optimize import OptimizedInternViT
from tests.support.hooks import KINDS, count_calls

CONFIG = internvit.InternViTConfig.from_name("internvit-6b-448px-v2.5").replace(
    num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, image_size=56, name=None
)


class FakeGraph:
    """As a CUDA graph: keeps each op with the tensors it read and wrote; a replay computes into those very tensors."""

    made: ClassVar[list["FakeGraph"]] = []

    def __init__(self) -> None:
        self.ops: list[tuple] = []
        self.replays = 0
        FakeGraph.made.append(self)

    def replay(self) -> None:
        assert self.ops, "replayed after reset, or before capture"
        self.replays += 1
        for func, args, kwargs, outputs in self.ops:
            again = func(*args, **kwargs)
            leaves = (torch.utils._pytree.tree_leaves(t) for t in (outputs, again))
            for kept, new in zip(*leaves, strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)

    def reset(self) -> None:
        self.ops.clear()


class Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.graph.ops.append((func, args, kwargs or {}, outputs))
        return outputs


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's graph functions, for CPU tensors; yields the order of what was asked of streams."""
    log = []

    def stream(name):
        return types.SimpleNamespace(name=name, wait_stream=lambda other: log.append(f"{name} waits for {other.name}"))

    current = stream("current")

    @contextlib.contextmanager
    def on(side):
        log.append(f"on {side.name}")
        yield
        log.append(f"off {side.name}")

    @contextlib.contextmanager
    def capture(graph, pool=None, capture_error_mode="global"):
        log.append(f"capture in {pool}, {capture_error_mode}")
        with Recorder(graph):
            yield

    for name, value in {
        "Stream": lambda: stream("side"),
        "current_stream": lambda: current,
        "stream": on,
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "graph_pool_handle": lambda: "pool",
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    FakeGraph.made.clear()
    return log


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return internvit.InternViT(CONFIG, dtype=dtype).eval()


def graphed(network, **settings):
    graphs = GraphedFunction(**settings)
    return OptimizedInternViT(network, pack=False, graphs=graphs, residual_dtype=None).eval()


def test_replays_give_each_inputs_own_features(fake_cuda):
    network = model()
    fast, plain = graphed(network), OptimizedInternViT(network, pack=False).eval()
    images = [torch.randn(2, 3, 56, 56) for _ in range(4)]
    results = [fast(x, output_hidden_states=True) for x in images]
    assert len(FakeGraph.made) == 1
    assert FakeGraph.made[0].replays == 4
    for x, result in zip(images, results, strict=True):
        expected = plain(x, output_hidden_states=True)
        assert torch.equal(result.last_hidden_state, expected.last_hidden_state)
        assert len(result.hidden_states) == 3
        for a, b in zip(result.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(a, b)
    assert "CUDA graph" in repr(fast)


def test_warm_up_is_on_a_side_stream_before_the_capture(fake_cuda):
    runs = []
    graphs = GraphedFunction()

    def run(x):
        runs.append(len(fake_cuda))
        return (x * 2,)

    x = torch.randn(3)
    assert torch.equal(graphs(run, x)[0], x * 2)
    assert fake_cuda == [
        "side waits for current",
        "on side",
        "off side",
        "current waits for side",
        "capture in pool, thread_local",
    ]
    assert len(runs) == WARM_UPS + 1
    assert torch.equal(graphs(run, x + 1)[0], (x + 1) * 2)
    assert len(runs) == WARM_UPS + 1, "a replay runs no Python"


def test_one_graph_per_shape_dtype_backend_and_autocast_and_no_more_than_the_limit(fake_cuda):
    graphs = GraphedFunction(limit=3)
    run = lambda x: (x + 1,)  # noqa: E731
    for shape in ((1, 2), (2, 2), (3, 2), (1, 2), (4, 2)):  # (2, 2) is the one unused for longest
        graphs(run, torch.zeros(shape))
    assert len(graphs) == 3
    assert [bool(g.ops) for g in FakeGraph.made] == [True, False, True, True]
    graphs(run, torch.zeros(1, 2))
    assert len(FakeGraph.made) == 4
    graphs(run, torch.zeros(1, 2, dtype=torch.float64))
    graphs(run, torch.zeros(1, 2), variant="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graphs(run, torch.zeros(1, 2))
    assert len(FakeGraph.made) == 7
    fast = graphed(model())
    pixels = torch.randn(1, 3, 56, 56)
    before = len(FakeGraph.made)
    for name in ("auto", "reference", "auto"):
        with internvit.ops.backend(name):
            fast(pixels)
    fast(pixels, output_hidden_states=True)
    assert len(FakeGraph.made) == before + 3


def test_a_padded_batch_has_the_bits_of_its_own(fake_cuda):
    """On a CPU every op and this size's products are batch-invariant; an earlier call's images leave no trace."""
    network = model()
    fast, plain = graphed(network, batches=(8, 2, 4)), OptimizedInternViT(network, pack=False).eval()
    for batch in (3, 1, 8, 5, 2, 4, 3):
        pixels = torch.randn(batch, 3, 56, 56)
        actual = fast(pixels, output_hidden_states=True)
        expected = [plain(image, output_hidden_states=True) for image in pixels.split(1)]
        for i, image in enumerate(expected):
            assert torch.equal(actual.last_hidden_state[i : i + 1], image.last_hidden_state)
            for a, b in zip(actual.hidden_states, image.hidden_states, strict=True):
                assert a.shape[0] == batch
                assert torch.equal(a[i : i + 1], b)
    assert len(FakeGraph.made) == 3, "one for 2, 4 and 8"
    assert fast(torch.randn(9, 3, 56, 56)).last_hidden_state.shape[0] == 9
    assert len(FakeGraph.made) == 4, "more than the largest: a graph of its own"


def test_internvls_1_to_13_tiles_keep_their_graphs(fake_cuda):
    fast = graphed(model(), batches=(1, 2, 4, 8, 13))
    for _ in range(2):
        for tiles in range(1, 14):
            fast(torch.randn(tiles, 3, 56, 56))
    assert len(FakeGraph.made) == 5


def test_padding_is_finite_and_nothing_of_it_is_returned(fake_cuda):
    graphs = GraphedFunction(batches=(4,))
    seen = []
    (y,) = graphs(lambda x: (seen.append(x.isfinite().all()) or x * 2,), torch.ones(3, 2))
    assert y.shape == (3, 2)
    assert all(seen)


@pytest.mark.parametrize("settings", [{"limit": 0}, {"limit": 2.5}, {"batches": (4, 0)}, {"batches": (True,)}], ids=str)
def test_limits_and_batches_are_numbers_of_at_least_1(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} must be whole numbers of at least 1, got"):
        GraphedFunction(**settings)
    with pytest.raises(ValueError, match=f"{name} must be whole numbers of at least 1, got"):
        internvit.optimize_for_inference(model(), **{f"graph_{name}": settings[name]})


def test_copies_keep_limit_and_batches(fake_cuda):
    fast = graphed(model(), limit=3, batches=(1, 5))
    fast(torch.randn(1, 3, 56, 56))
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert (copied._graphs.limit, copied._graphs.batches, len(copied._graphs)) == (3, (1, 5), 0)


def test_undo_frees_the_graphs(fake_cuda):
    network = model()
    fast, pixels = graphed(network), torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        fast(pixels)
    fast(pixels)  # the graph made in inference mode serves outside it
    assert len(FakeGraph.made) == 1
    assert fast.undo() is network
    assert not FakeGraph.made[0].ops
    assert len(fast._graphs) == 0


def changes():
    """What is done to a model after capture -> whether the graph can go on as it is."""

    def in_place(network):
        with torch.no_grad():
            network.encoder.layers[0].ls1.mul_(2)

    def by_data(network):
        network.encoder.layers[1].mlp.fc1.weight.data.mul_(1.5)

    def moved(network):
        network.encoder.layers[0].attn.proj.weight.data = torch.randn(64, 64)

    def replaced(network):
        network.encoder.layers[1].norm2.weight = torch.nn.Parameter(torch.rand(64))

    def replaced_module(network):
        network.encoder.layers[0].mlp.fc2 = torch.nn.Linear(128, 64)

    def rounding(network):
        network.bfloat16().set_rounding("reference")

    def shorter(network):
        del network.encoder.layers[1:]

    def loaded(network):
        network.load_state_dict({k: v * 1.1 for k, v in network.state_dict().items()})

    return [(in_place, True), (by_data, True), (loaded, True)] + [
        (change, False) for change in (moved, replaced, replaced_module, rounding, shorter)
    ]


@pytest.mark.parametrize(("change", "kept"), changes(), ids=lambda value: getattr(value, "__name__", None))
def test_a_graph_computes_with_the_model_as_it_is(change, kept, fake_cuda):
    network = model()
    fast, pixels = graphed(network), torch.randn(1, 3, 56, 56)
    before = fast(pixels).last_hidden_state
    change(network)
    with torch.no_grad():
        expected = network(pixels).last_hidden_state
    after = fast(pixels).last_hidden_state
    assert torch.equal(after, expected)
    assert not torch.equal(after.float(), before.float())
    assert len(FakeGraph.made) == (1 if kept else 2)


@pytest.mark.parametrize("name", ["", "layers.0", "layers.1.attn", "layers.0.mlp.fc1", "layers.1.attn.q_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_added_after_capture_run(name, kind, fake_cuda):
    network = model()
    fast, pixels = graphed(network), torch.randn(1, 3, 56, 56)
    expected = fast(pixels).last_hidden_state
    module = network.encoder.get_submodule(name)
    calls = count_calls(module, kind)
    for count in (1, 2):
        assert torch.allclose(fast(pixels).last_hidden_state, expected, atol=1e-5)
        assert len(calls) == count


def test_no_graph_inside_a_capture_nor_of_nothing(fake_cuda, monkeypatch):
    fast = graphed(model())
    assert fast(torch.randn(0, 3, 56, 56)).last_hidden_state.shape == (0, 17, 64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fast(torch.randn(1, 3, 56, 56))
    assert not FakeGraph.made


def test_models_that_cannot_be_captured():
    with pytest.raises(ValueError, match=r"cuda_graph=True needs a model on a CUDA device, got cpu; move the model"):
        internvit.optimize_for_inference(model(), cuda_graph=True)


def test_hooks_are_refused(monkeypatch):
    hooked = model()
    hooked.encoder.layers[1].mlp.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(internvit.InternViT, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"cuda_graph=True cannot take layers \[1\]: their hooks"):
        internvit.optimize_for_inference(hooked, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype):
    network = model(dtype).cuda()
    plain = internvit.optimize_for_inference(network)
    fast = internvit.optimize_for_inference(network, cuda_graph=True)
    held = torch.cuda.memory_allocated()
    for batch in (1, 2, 1, 3):
        pixels = torch.randn(batch, 3, 56, 56, device="cuda", dtype=dtype)
        assert torch.equal(fast(pixels).last_hidden_state, plain(pixels).last_hidden_state)
    del pixels
    fast.undo()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= held + 2**20
