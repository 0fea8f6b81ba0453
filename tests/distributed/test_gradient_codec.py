"""The codecs: what they promise, and that C++ and CUDA give the bits of the formula."""

import ctypes
import itertools
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from freeadv_fast import ops, toolchain
from freeadv_fast.distributed import codec, shuffle
from freeadv_fast.distributed.codec import BLOCK, LEVELS, Column, Piece, RandomStream, Stage
from freeadv_fast.runs.environment import build_info

CPU = torch.device("cpu")
CODECS = ["paper", "bucket"]
# Whole blocks, ends of blocks, blocks at odd places, one element.
SIZES = [1300, 64, 10, 512, 5000, 1, 2048]
STREAM = RandomStream(2**50 + 3, torch.tensor([2**33 + 5]), 3, Stage.MEAN)

needs_extension = pytest.mark.skipif(
    ops.codec_backend("cpu") != "compiled", reason="freeadv_fast._C was not built here"
)
can_compile = pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a compiler")


def end_to_end(sizes):
    """Parameters of a network, all in one bucket, in order."""
    offsets = itertools.accumulate(sizes, initial=0)
    return list(map(Piece, codec.number_blocks(sizes), offsets, sizes))


def lay_out(sizes, kind, *, num_ranks=1, rank=0):
    return codec.lay_out(end_to_end(sizes), codec=kind, rank=rank, num_ranks=num_ranks, device=CPU)


def make_gradients(sizes=SIZES):
    """Gradients of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    count = sum(sizes)
    return torch.randn(count, generator=generator) * torch.rand(count, generator=generator) ** 6


def encode(gradients, layout, stream=STREAM, num_ranks=1):
    message = torch.zeros(num_ranks * layout.num_bytes, dtype=torch.uint8)
    codec.encode_gradients(gradients, layout.blocks, stream, message)
    return message


def round_trip(gradients, layout, stream=STREAM):
    decoded = torch.full_like(gradients, 7)
    codec.decode_gradients(encode(gradients, layout, stream), layout.blocks, decoded)
    return decoded


def scales_of(message, layout):
    """The scale of each element of the gradients."""
    scales = message.view(torch.float32)[layout.blocks.table[:, Column.SCALE].long()]
    return scales.repeat_interleave(layout.blocks.table[:, Column.LENGTH].long())


def are_same_bits(first, second):
    """NaN is equal to NaN here, whichever the device makes of them, and 0 is not to -0."""
    if first.is_floating_point():  # x86 hands an operand's NaN on, a GPU makes one of its own
        first, second = (t.where(~t.isnan(), torch.nan) for t in (first, second))
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


def test_the_random_words_are_those_of_the_exchange():
    counter = np.array([[0, 1, 2, 3], [2**32 - 1, 7, 2**31 + 9, 2**32 - 1]], np.uint64)
    for seed in (0, 2**63 - 1, 11):
        words = codec._philox(torch.from_numpy(counter.astype(np.int64)).T, seed)
        assert torch.stack(words, 1).tolist() == shuffle.philox(counter, seed).tolist()


@pytest.mark.parametrize("kind", CODECS)
def test_a_gradient_comes_back_within_one_level(kind):
    gradients, layout = make_gradients(), lay_out(SIZES, kind)
    error = (round_trip(gradients, layout) - gradients).abs()
    scales = scales_of(encode(gradients, layout), layout)
    assert (error <= scales / LEVELS * (1 + 1e-5)).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", CODECS)
def test_scales_are_what_the_codec_says(kind):
    gradients, layout = make_gradients(), lay_out(SIZES, kind)
    found = scales_of(encode(gradients, layout), layout).split(SIZES)
    for tensor, scales in zip(gradients.split(SIZES), found, strict=True):
        if kind == "paper":
            expected = torch.full_like(tensor, torch.linalg.vector_norm(tensor.double()))
        else:
            expected = torch.cat([b.abs().amax().expand(len(b)) for b in tensor.split(BLOCK)])
        assert (scales >= expected * (1 - 2**-24)).all()  # rounded up, to 16 bits
        assert (scales <= expected * (1 + 2**-15)).all()


@pytest.mark.parametrize("kind", CODECS)
def test_the_mean_of_10000_draws_is_the_gradient(kind):
    """Within 3 standard errors, which a level's distance to its two neighbours decides."""
    num_draws, size = 10_000, 300
    values = make_gradients([size])
    layout = lay_out([size] * num_draws, kind)
    draws = round_trip(values.repeat(num_draws), layout).view(num_draws, size).double()
    scale = scales_of(encode(values, lay_out([size], kind)), lay_out([size], kind)).double()
    part = (values.abs() * LEVELS / scale) % 1
    standard_error = (part * (1 - part) / num_draws).sqrt() * scale / LEVELS
    z = (draws.mean(0) - values) / standard_error
    assert (z.abs() < 3).float().mean() >= 0.98  # 99.7 % are expected to be
    assert z.mean().abs() * math.sqrt(size) < 3
    assert 0.8 < z.std() < 1.2


def test_every_stream_has_bits_of_its_own():
    gradients, layout = make_gradients([BLOCK]), lay_out([BLOCK], "bucket")
    base = {"seed": 1, "update": torch.tensor([2]), "rank": 3, "stage": Stage.GRADIENTS}
    others = [
        {}, {"seed": 2}, {"seed": 1 + 2**32}, {"update": torch.tensor([3])},
        {"update": torch.tensor([2 + 2**32])}, {"rank": 2}, {"stage": Stage.MEAN},
    ]  # fmt: skip
    messages = {
        tuple(encode(gradients, layout, RandomStream(**(base | o))).tolist()) for o in others
    }
    assert len(messages) == len(others)


def test_the_bytes_of_a_message_never_change():
    """A run that one version began is resumed by another."""
    gradients = torch.tensor([0.5, -0.25, 0.1, 0.003, -1.0])
    for kind, levels, scale in (
        ("bucket", [63, -32, 12, 1, -127, 0, 0, 0], 1.0),
        ("paper", [55, -27, 11, 0, -111, 0, 0, 0], 1.1500244140625),
    ):
        message = encode(gradients, lay_out([5], kind))
        assert message.view(torch.int8)[:8].tolist() == levels
        assert message.view(torch.float32)[2:].tolist() == [scale]


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_element_has_one_place_in_one_message(kind, num_ranks):
    layout = lay_out(SIZES, kind, num_ranks=num_ranks)
    elements, places = [], []
    for offset, length, number, levels, scale, _ in layout.blocks.table.tolist():
        elements += range(offset, offset + length)
        places += range(levels, levels + -(-length // 4) * 4)
        owner = number % num_ranks
        assert levels // layout.num_bytes == scale * 4 // layout.num_bytes == owner
    scales = {4 * scale for scale in layout.blocks.table[:, Column.SCALE].tolist()}
    places += [byte + k for byte in scales for k in range(4)]
    assert elements == list(range(sum(SIZES)))
    assert len(places) == len(set(places))
    assert max(places) < num_ranks * layout.num_bytes
    for rank in range(num_ranks):
        own = lay_out(SIZES, kind, num_ranks=num_ranks, rank=rank).own.table
        theirs = layout.blocks.table[layout.blocks.table[:, Column.NUMBER] % num_ranks == rank]
        shift = torch.zeros(6, dtype=torch.int32)
        shift[Column.LEVELS], shift[Column.SCALE] = layout.num_bytes, layout.num_bytes // 4
        assert torch.equal(own[:, :-1], (theirs - rank * shift)[:, :-1])


def numbers_of(blocks):
    return blocks.table[:, Column.NUMBER].tolist()


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize(("num_machines", "local_size"), [(2, 2), (3, 2), (2, 3), (8, 4)])
def test_every_block_has_one_owner_which_gets_it_from_every_machine(kind, num_machines, local_size):
    """Also where there are fewer blocks than ranks, and some have none."""
    size = num_machines * local_size
    layouts = [
        codec.lay_out(
            end_to_end(SIZES), codec=kind, rank=rank, num_ranks=size, local_size=local_size,
            device=CPU,
        )
        for rank in range(size)
    ]  # fmt: skip
    every = numbers_of(layouts[0].blocks)
    assert sorted(n for layout in layouts for n in numbers_of(layout.own)) == every
    assert len({layout.num_bytes for layout in layouts}) == 1
    num_bytes = layouts[0].num_bytes
    for machine in range(num_machines):
        ranks = layouts[machine * local_size :][:local_size]
        assert sorted(n for layout in ranks for n in numbers_of(layout.share)) == every
        for place, layout in enumerate(ranks):
            for row in layout.share.table.tolist():
                to = row[Column.LEVELS] // num_bytes
                owner = layouts[to * local_size + place]
                (at_owner,) = (
                    own
                    for own in owner.own.table.tolist()
                    if own[Column.NUMBER] == row[Column.NUMBER]
                )
                assert to == row[Column.NUMBER] // local_size % num_machines
                assert at_owner[Column.LEVELS] == row[Column.LEVELS] - to * num_bytes
                assert at_owner[Column.SCALE] == row[Column.SCALE] - to * num_bytes // 4


@pytest.mark.parametrize("kind", CODECS)
def test_a_rank_alone_on_its_machine_encodes_everything(kind):
    layout = lay_out(SIZES, kind, num_ranks=3, rank=1)
    assert torch.equal(layout.share.table, layout.blocks.table)
    if kind == "paper":
        assert torch.equal(layout.share.segments, layout.blocks.segments)


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_resnet_sends_a_byte_an_element(kind, num_ranks):
    """ResNet-50 in buckets of 25 MiB: 2 (n - 1) / n bytes, the scales, and 0.1 % of filling."""
    with torch.device("meta"):
        sizes = [p.numel() for p in torchvision.models.resnet50().parameters()]
    pieces, sent, num_scales, start = end_to_end(sizes), 0, 0, 0
    while start < len(pieces):
        end = start + 1
        while end < len(pieces) and sum(sizes[start : end + 1]) * 4 <= 25 * 2**20:
            end += 1
        layout = codec.lay_out(
            pieces[start:end], codec=kind, rank=0, num_ranks=num_ranks, device=CPU
        )
        sent += 2 * (num_ranks - 1) * layout.num_bytes
        num_scales += len(layout.blocks.table[:, Column.SCALE].unique())
        start = end
    figure = 2 * (num_ranks - 1) / num_ranks * (sum(sizes) + 4 * num_scales)
    assert figure <= sent <= 1.001 * figure


@pytest.mark.parametrize("kind", CODECS)
def test_the_buckets_of_data_parallelism_decide_nothing(kind):
    """Other buckets, other places in them: the same bits."""
    pieces, gradients = end_to_end(SIZES), make_gradients()
    whole = round_trip(gradients, lay_out(SIZES, kind))
    for bucket in ([4, 1], [6, 0, 5], [2], [3]):
        moved, parts = [], []
        for index in bucket:
            piece = pieces[index]
            moved.append(Piece(piece.first_block, sum(map(len, parts)), piece.num_elements))
            parts.append(gradients[piece.offset : piece.offset + piece.num_elements])
        layout = codec.lay_out(moved, codec=kind, rank=0, num_ranks=1, device=CPU)
        found = round_trip(torch.cat(parts), layout).split([len(part) for part in parts])
        for index, values in zip(bucket, found, strict=True):
            piece = pieces[index]
            expected = whole[piece.offset : piece.offset + piece.num_elements]
            assert are_same_bits(values, expected)


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -1e-40])
def test_a_segment_of_zeros_decodes_to_zeros(kind, value):
    """As does one that is smaller than any scale."""
    layout = lay_out([BLOCK, 100], kind)
    gradients = make_gradients([BLOCK, 100])
    gradients[BLOCK:] = value
    message, decoded = encode(gradients, layout), round_trip(gradients, layout)
    assert scales_of(message, layout)[BLOCK:].tolist() == [0.0] * 100
    assert decoded[BLOCK:].tolist() == [0.0] * 100
    assert decoded[:BLOCK].any()


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_segment_that_is_not_finite_decodes_to_nan_everywhere(kind, value):
    sizes = [2 * BLOCK, 100]
    gradients = make_gradients(sizes)
    gradients[3] = value
    decoded = round_trip(gradients, lay_out(sizes, kind))
    num_lost = BLOCK if kind == "bucket" else 2 * BLOCK
    assert decoded[:num_lost].isnan().all()
    assert decoded[num_lost:].isfinite().all()


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_levels_do_not_depend_on_the_size_of_gradients(kind, size):
    """Nothing overflows or is lost at the ends of the range."""
    gradients, layout = make_gradients(), lay_out(SIZES, kind)
    power = 2.0 ** round(math.log2(size))
    scaled = round_trip(gradients * power, layout)
    assert are_same_bits(scaled / power, round_trip(gradients, layout))


def strange_gradients():
    """Gradients with everything that has a rule of its own."""
    gradients = make_gradients()
    for piece, value in zip(end_to_end(SIZES)[1:4], (0.0, 1e-35, math.inf), strict=True):
        gradients[piece.offset : piece.offset + piece.num_elements] = value
    gradients[600] = math.nan
    return gradients


# Bytes that no operation may touch.
FILLING = 85


def all_results(encode_gradients, encode_mean, decode_gradients, kind, num_ranks):
    """Every byte that the three operations write, as the last rank writes them."""
    layout = lay_out(SIZES, kind, num_ranks=num_ranks, rank=num_ranks - 1)
    gradients, messages = strange_gradients(), []
    for rank in range(num_ranks):
        sent = torch.full((num_ranks * layout.num_bytes,), FILLING, dtype=torch.uint8)
        stream = RandomStream(STREAM.seed, STREAM.update, rank, Stage.GRADIENTS)
        encode_gradients(gradients.roll(37 * rank), layout.blocks, stream, sent)
        messages.append(sent)
    decoded = torch.full_like(gradients, 7)
    decode_gradients(messages[0], layout.blocks, decoded)
    mean = torch.full((layout.num_bytes,), FILLING, dtype=torch.uint8)
    received = torch.stack([m.view(num_ranks, -1)[-1] for m in messages])
    encode_mean(received, layout.own, STREAM, mean)
    return [*messages, mean, decoded]


REFERENCE = codec.encode_gradients_ref, codec.encode_mean_ref, codec.decode_gradients_ref


@needs_extension
@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_compiled_and_reference_agree_bit_for_bit(kind, num_ranks):
    chosen = codec.encode_gradients, codec.encode_mean, codec.decode_gradients
    found = all_results(*chosen, kind, num_ranks)
    expected = all_results(*REFERENCE, kind, num_ranks)
    assert all(are_same_bits(*pair) for pair in zip(found, expected, strict=True))
    assert expected[-1].isnan().any()
    assert (expected[-1] == 0).any()


@needs_extension
def test_threads_change_nothing():
    sizes, gradients = [300_000], make_gradients([300_000])
    for kind in CODECS:
        layout = lay_out(sizes, kind)
        alone = encode(gradients, layout)
        torch.set_num_threads(3)
        assert torch.equal(encode(gradients, layout), alone)
        torch.set_num_threads(1)


@needs_extension
def test_the_compiled_codec_covers_the_devices_it_was_built_for():
    """CUDA sources compiled and linked: the operations have kernels for the device."""
    has_cuda = build_info()["cuda"] is not None
    assert ops.codec_backend("cuda") == ("compiled" if has_cuda else "eager")


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gradients": torch.zeros(8, dtype=torch.float64)},
            "gradients: expected contiguous Float",
        ),
        ({"gradients": torch.zeros(16)[::2]}, "gradients: expected contiguous Float"),
        ({"update": torch.zeros(1)}, "update: expected contiguous Long"),
        ({"message": torch.zeros(12)}, "message: expected contiguous Byte"),
        ({"table": torch.zeros(1, 5, dtype=torch.int32)}, r"table: expected \(K, 6\)"),
        ({"table": torch.zeros(1, 6)}, "table: expected contiguous Int"),
    ],
)
def test_what_the_operations_refuse(change, message):
    layout = lay_out([8], "bucket")
    request = {
        "gradients": torch.zeros(8), "table": layout.blocks.table, "segments": None,
        "update": torch.zeros(1, dtype=torch.int64), "seed": 0, "word": 0,
        "message": torch.zeros(12, dtype=torch.uint8),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops.encode_gradients(**(request | change))


def test_more_elements_than_counters_are_refused():
    with pytest.raises(ValueError, match="expected at most 33554432"):
        codec.number_blocks([2**34, 1])


# What the emulation below calls: the three launchers, with plain pointers.
ENTRY_POINTS = """
using namespace freeadv_fast;
extern "C" void encode_gradients(const float* gradients, const Block* rows, int64_t num_rows,
                                 const int32_t* segments, int64_t num_segments,
                                 const int64_t* update, uint64_t seed, uint32_t word, char* out) {
  std::vector<double> squares(num_rows);
  std::vector<float> scales(num_segments);
  encode_cuda(Gradients{gradients}, {rows, num_rows, segments, num_segments},
              {seed, update, word}, {squares.data(), scales.data()}, out, nullptr);
}
extern "C" void encode_mean(const char* messages, int64_t num, int64_t stride, const Block* rows,
                            int64_t num_rows, const int32_t* segments, int64_t num_segments,
                            const int64_t* update, uint64_t seed, uint32_t word, char* out) {
  std::vector<double> squares(num_rows);
  std::vector<float> scales(num_segments);
  encode_cuda(Messages{messages, num, stride, float(1.0 / (127.0 * num))},
              {rows, num_rows, segments, num_segments}, {seed, update, word},
              {squares.data(), scales.data()}, out, nullptr);
}
extern "C" void decode_gradients(const char* message, int64_t num_bytes, const Block* rows,
                                 int64_t num_rows, float* gradients) {
  decode_cuda(Messages{message, 1, num_bytes, float(1.0 / 127.0)}, {rows, num_rows, nullptr, 0},
              gradients, nullptr);
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory, request):
    """The CUDA source, its launches replaced, as a library for the CPU."""
    csrc = Path(request.config.rootpath) / "csrc"
    folder = tmp_path_factory.mktemp("emulated")
    source = (csrc / "gradient_codec_cuda.cu").read_text()
    source, num_launches = re.subn(
        r"(\w+(?:<\w+>)?)\s*<<<([^;]*?)>>>(\([^;]*?\));", r"emulate(Launch{\2}, [&] { \1\3; });",
        source,
    )  # fmt: skip
    assert num_launches == 4
    (folder / "codec.cpp").write_text(source + ENTRY_POINTS)
    header = Path(__file__).with_name("emulated_cuda.h").read_text()
    (folder / "cuda_runtime_api.h").write_text(header)
    command = [
        toolchain.find_cxx(), "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread",
        "-Wno-unknown-pragmas", "-DFREEADV_FAST_WITH_CUDA", f"-I{folder}", f"-I{csrc}",
        folder / "codec.cpp", "-o", folder / "codec.so",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "codec.so"))


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def place(blocks):
    """The arguments that name blocks."""
    num_segments = 0 if blocks.segments is None else len(blocks.segments) - 1
    table = blocks.table
    return (
        pointer(table), ctypes.c_int64(len(table)), pointer(blocks.segments),
        ctypes.c_int64(num_segments),
    )  # fmt: skip


def bits(stream):
    return pointer(stream.update), ctypes.c_uint64(stream.seed), ctypes.c_uint32(stream.word)


@can_compile
@pytest.mark.parametrize("kind", CODECS)
def test_the_cuda_kernels_emulated_give_the_bits_of_the_formula(emulated, kind):
    """Their indexing, shuffles and barriers, a CPU thread for each of theirs."""

    def encode_gradients(gradients, blocks, stream, message):
        emulated.encode_gradients(
            pointer(gradients), *place(blocks), *bits(stream), pointer(message)
        )

    def encode_mean(messages, blocks, stream, message):
        shape = map(ctypes.c_int64, messages.shape)
        emulated.encode_mean(
            pointer(messages), *shape, *place(blocks), *bits(stream), pointer(message)
        )

    def decode_gradients(message, blocks, gradients):
        emulated.decode_gradients(
            pointer(message), ctypes.c_int64(len(message)), *place(blocks)[:2], pointer(gradients)
        )

    found = all_results(encode_gradients, encode_mean, decode_gradients, kind, 2)
    expected = all_results(*REFERENCE, kind, 2)
    assert all(are_same_bits(*pair) for pair in zip(found, expected, strict=True))


@can_compile
def test_the_norm_of_a_long_tensor_emulated_is_that_of_the_formula(emulated):
    """More blocks than running sums."""
    sizes = [BLOCK * 300]
    layout, gradients = lay_out(sizes, "paper"), make_gradients(sizes)
    found, expected = torch.zeros(2, layout.num_bytes, dtype=torch.uint8)
    emulated.encode_gradients(
        pointer(gradients), *place(layout.blocks), *bits(STREAM), pointer(found)
    )
    codec.encode_gradients_ref(gradients, layout.blocks, STREAM, expected)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", CODECS)
def test_a_gpu_gives_the_bits_of_the_formula(kind):
    if ops.codec_backend("cuda") != "compiled":
        pytest.skip("freeadv_fast._C was not built with CUDA here")
    device = torch.device("cuda", 0)
    layouts = [
        codec.lay_out(end_to_end(SIZES), codec=kind, rank=0, num_ranks=1, device=d)
        for d in (CPU, device)
    ]
    gradients, found = strange_gradients(), []
    for layout, place_ in zip(layouts, (CPU, device), strict=True):
        stream = RandomStream(STREAM.seed, STREAM.update.to(place_), 3, Stage.MEAN)
        message = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=place_)
        mean, decoded = torch.zeros_like(message), gradients.to(place_)
        codec.encode_gradients(gradients.to(place_), layout.blocks, stream, message)
        codec.encode_mean(torch.stack([message] * 3), layout.own, stream, mean)
        codec.decode_gradients(message, layout.blocks, decoded)
        found.append([message.cpu(), mean.cpu(), decoded.cpu()])
    assert all(are_same_bits(*pair) for pair in zip(*found, strict=True))
