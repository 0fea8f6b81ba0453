"""Updates as recordings: what is copied, what is recorded anew, and that training is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded_training import Recorder, build_learner, build_method, minibatches
from torch.utils._python_dispatch import TorchDispatchMode

from freeadv_fast.config.method_names import DUAL, METHODS, WARMING
from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn
from freeadv_fast.step.averaging import WeightAverage
from freeadv_fast.step.graphs import WARM_UP, CudaRecorder, GraphRunner
from freeadv_fast.step.optim import is_capturable


def add(total, value, factor):
    """A step: adds to the first tensor and doubles the second, in place."""
    total += factor * value
    value *= 2


@pytest.fixture
def lines():
    return []


def runner_of(lines, recorder=None):
    return GraphRunner(lines.append, recorder or Recorder(), warm_up=2)


def test_a_changed_tensor_is_copied_and_an_unchanged_one_is_not(lines):
    """What a step wrote into its own copy of an input stays there until another one is given."""
    run, total = runner_of(lines), torch.zeros(2)

    def step(value):
        add(total, value, 1.0)

    for _ in range(2):
        run(step, torch.ones(2))  # warm-up
    value = torch.ones(2)
    run(step, value)
    run(step, value)
    assert total.tolist() == [2 + 1 + 2] * 2
    assert value.tolist() == [1, 1]  # the recording has its own
    value += 4
    run(step, value)
    assert total.tolist() == [5 + 5] * 2
    run(step, torch.ones(2))
    assert total.tolist() == [11] * 2


def test_a_new_tensor_in_the_place_of_a_dead_one_is_copied(lines):
    """Python and the allocator reuse addresses at once; the recording must not be fooled."""
    run, seen = runner_of(lines), []

    def step(value):
        seen.append(value.clone())

    for number in range(12):
        run(step, torch.full((3,), float(number)))
    assert [int(value[0]) for value in seen] == list(range(12))


def test_each_shape_and_number_has_a_recording(lines):
    recorder = Recorder()
    run, total = runner_of(lines, recorder), torch.zeros(())

    def step(value, factor):
        total.add_(value.sum(), alpha=factor)

    for _ in range(4):
        run(step, torch.ones(2), 1.0)
        run(step, torch.ones(3), 1.0)
        run(step, torch.ones(2), 10.0)
    assert recorder.num_recordings == 3
    assert total == 4 * (2 + 3 + 20)
    run.forget()
    assert recorder.num_beginnings == 2  # memory of their own
    for _ in range(3):
        run(step, torch.ones(2), 1.0)
    assert recorder.num_recordings == 4


def test_ranks_record_in_the_same_updates(lines):
    """NCCL's collectives have to be recorded by all ranks or by none.

    An epoch's last seven images are four on one rank, as many as ever, and three on the other.
    """
    recorders = Recorder(), Recorder()
    runs = [runner_of(lines, recorder) for recorder in recorders]
    for _ in range(4):
        for num_images, global_size in (((4, 4), 8), ((4, 3), 7)):
            for run, num in zip(runs, num_images, strict=True):
                run(add, torch.zeros(num), torch.ones(num), global_size)
            counts = [(recorder.num_recordings, recorder.num_launches) for recorder in recorders]
            assert counts[0] == counts[1]
    assert counts[0] == (2, 4)


def test_other_inputs_run_eagerly(lines):
    recorder = Recorder()
    run, seen = runner_of(lines, recorder), []
    for number in range(4):
        run(seen.append, [number])
    assert seen == [[0], [1], [2], [3]]
    assert recorder.num_recordings == 0
    assert not lines


def test_what_cannot_be_recorded_runs_eagerly_and_says_why(lines):
    recorder = Recorder(RuntimeError("operation not permitted when stream is capturing\nat: ..."))
    run, total = runner_of(lines, recorder), torch.zeros(2)
    for _ in range(5):
        run(add, total, torch.ones(2), 1.0)
    assert total.tolist() == [5, 5]
    assert lines == [
        "graphs: off, this step cannot be recorded (operation not permitted when stream is "
        "capturing)"
    ]


def test_short_memory_beside_recordings_is_told_with_the_flag(lines):
    """A smaller last minibatch warms up beside the memory that a recording holds."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    def step(value):
        if len(value) == 3:
            raise error

    run = runner_of(lines)
    with pytest.raises(torch.OutOfMemoryError):  # nobody else's fault
        run(step, torch.ones(3))
    for _ in range(3):
        run(step, torch.ones(2))
    fix = r"--graphs: out of memory.*\(CUDA out of memory. Tried.*\); use --graphs off"
    with pytest.raises(UserError, match=fix):
        run(step, torch.ones(3))


def train(name, network, runner, device="cpu", dtype=torch.float32, recorder=None, accumulate=1):
    """Eight epochs of two full minibatches and a smaller one, with an average of the weights."""
    torch.manual_seed(0)
    if name in DUAL:
        network = DualNetwork(add_auxiliary_bn(network.to(device), 3))
    learner = build_learner(network, device, dtype)
    learner.average = WeightAverage(learner.network, 0.9)
    if runner is not None:
        learner.record_with(runner)
    if recorder is not None:
        recorder.learner = learner
    method = build_method(name, learner, device, accumulate)
    for images, labels in minibatches([6, 6, 4] * 8, device):
        method.train_minibatch(images, labels, len(images))
    return learner, method


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [(name, n) for n in (1, 3) for name in METHODS if n == 1 or name not in (*DUAL, "gradalign")],
)
def test_recorded_training_is_the_same_training(small_network, name, accumulate, lines):
    """Weights, statistics, momentum, delta, meters, with rates that fall and attacks that grow.

    An update of three minibatches is one recording, and so is the one of the two that are left.
    """
    recorder = Recorder()
    runner = GraphRunner(lines.append, recorder)
    plain, plain_method = train(name, small_network(), None, accumulate=accumulate)
    recorded, method = train(
        name, small_network(), runner, recorder=recorder, accumulate=accumulate
    )
    assert recorder.num_recordings == 2
    eager = 2 * WARM_UP + 3 * (name in WARMING)  # three updates' attacks are shorter
    assert recorder.num_launches == recorded.updates - eager
    assert not lines
    assert recorded.updates == plain.updates > 12 + 2 * WARM_UP
    for (key, a), b in zip(
        recorded.net.state_dict().items(), plain.net.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
    for a, b in zip(recorded.average.tensors, plain.average.tensors, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(recorded.meters.sums, plain.meters.sums)
    for key, value in plain_method.state_dict().items():
        assert torch.equal(method.state_dict()[key], value)


@pytest.mark.parametrize("name", [name for name in WARMING if name != "gradalign"])
def test_an_attack_that_warms_up_is_recorded_when_it_is_warm(small_network, name, lines):
    """Until then every update has a scale of its own, which its step is given as a number."""
    recorder, scales = Recorder(), []
    learner = build_learner(small_network())
    learner.record_with(GraphRunner(lines.append, recorder))
    method = build_method(name, learner)
    attacker = method.fgsm if name == "elle" else method
    attack = attacker.attack

    def noting_attack(images, labels, attack_scale):
        scales.append(attack_scale)
        return attack(images, labels, attack_scale)

    attacker.attack = noting_attack
    for images, labels in minibatches([6] * (3 + WARM_UP)):
        method.train_minibatch(images, labels, 6)
    assert scales == [0.25, 0.5, 0.75] + [1.0] * WARM_UP
    assert recorder.num_recordings == 0
    for images, labels in minibatches([6]):
        method.train_minibatch(images, labels, 6)
    assert recorder.num_recordings == 1


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a value of the device to Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        reads = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        self.count += function.overloadpacket in reads
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_nothing_on_the_host(small_network, name, lines):
    """What a CPU can tell of what `set_sync_debug_mode` tells on a GPU."""
    learner, method = train(name, small_network(), GraphRunner(lines.append, Recorder()))
    ((images, labels),) = minibatches([6])
    with HostReads() as reads:
        method.train_minibatch(images, labels, 6)
    assert reads.count == 0
    with HostReads() as reads:
        learner.meters.sums.sum().item()
    assert reads.count == 1


def test_a_loaded_state_is_recorded_anew_and_keeps_the_device_rate(small_network, lines):
    """Optimizers replace their tensors when they load; an old recording would move dead ones."""
    recorder = Recorder()
    learner, method = train("free", small_network(), GraphRunner(lines.append, recorder))
    before, state = recorder.num_recordings, copy.deepcopy(learner.state_dict())
    learner.load_state_dict(state)
    (rate,) = {id(group["lr"]) for group in learner.optimizer.param_groups}
    for images, labels in minibatches([6, 6]):
        method.train_minibatch(images, labels, 6)
    assert recorder.num_recordings == before + 1
    assert {id(group["lr"]) for group in learner.optimizer.param_groups} == {rate}
    assert learner.optimizer.param_groups[0]["lr"] == learner.lr_at(learner.updates - 1)


def gpu(test):
    """Marks a test that records real CUDA graphs."""
    needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs_device(test))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*METHODS, "pgd-awp"])
def test_a_cuda_graph_trains_as_eager_steps_do(small_network, name, dtype, lines):
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        plain, plain_method = train(name, small_network(), None, "cuda", dtype)
        runner = GraphRunner(lines.append, CudaRecorder())
        recorded, method = train(name, small_network(), runner, "cuda", dtype)
    assert not lines
    assert is_capturable(recorded.optimizer)
    for (key, a), b in zip(
        recorded.net.state_dict().items(), plain.net.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=key)
    for a, b in zip(recorded.average.tensors, plain.average.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(recorded.meters.sums, plain.meters.sums, rtol=1e-2, atol=1e-2)
    for key, value in plain_method.state_dict().items():
        assert (method.state_dict()[key] != value).float().mean() < 0.05


@gpu
@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(small_network, name, is_recorded, lines):
    """Fused optimizer, meters, rate, perturbation: nothing reads the device; fp16's scaler too."""
    network = small_network().to("cuda")
    if name in DUAL:
        network = DualNetwork(add_auxiliary_bn(network, 3))
    learner = build_learner(network, "cuda", torch.float16)
    learner.average = WeightAverage(learner.network, 0.9)
    if is_recorded:
        learner.record_with(GraphRunner(lines.append, CudaRecorder()))
    method = build_method(name, learner, "cuda")
    batches = list(minibatches([6] * 6, "cuda"))
    for images, labels in batches:
        method.train_minibatch(images, labels, 6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in batches:
            method.train_minibatch(images, labels, 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not lines
