"""The look into a graph before it runs: what it takes, and everything that it has to refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.errors import EntryError
from embedkit.graph import ExternalTensor, check_graph, tensor_table


@pytest.fixture(scope="module")
def entry(by_hand):
    return by_hand.TinyEntry()


def refused(graph: bytes, weights: bytes) -> str:
    with pytest.raises(EntryError) as caught:
        check_graph(graph, weights, "model.onnx")
    message = str(caught.value)
    assert message.startswith("model.onnx") and "\n" not in message
    return message


def test_a_graph_of_ours_gives_its_external_tensors(entry):
    at = entry.start + entry.weight.nbytes
    assert check_graph(entry.graph, entry.weights, "model.onnx") == [
        ExternalTensor("weight", "model.safetensors", entry.start, entry.weight.nbytes, 10, (192, 4)),
        ExternalTensor("bias", "model.safetensors", at, 16, 1, (4,)),
    ]


def test_the_default_entry_takes_every_weight_from_the_file(default_entry):
    graph = (default_entry / "model.onnx").read_bytes()
    weights = (default_entry / "model.safetensors").read_bytes()
    assert len(graph) < 1_000_000
    found = {tensor.name for tensor in check_graph(graph, weights, "model.onnx")}
    floating = {name for name, row in tensor_table(weights, "").items() if row[0].startswith("F")}
    assert floating <= found


def test_the_table_equals_the_safetensors_package(entry):
    from safetensors.numpy import load

    arrays = load(entry.weights)
    table = tensor_table(entry.weights, "x")
    assert set(table) == set(arrays)
    for name, (dtype, shape, begin, end) in table.items():
        stored = np.frombuffer(entry.weights[begin:end], {"F16": "<f2", "F32": "<f4"}[dtype])
        np.testing.assert_array_equal(stored.reshape(shape), arrays[name])


# --- where external data may lie --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "../model.safetensors",
        "../../secret.bin",
        "/etc/passwd",
        "C:\\Windows\\win.ini",
        "\\\\server\\share\\x",
        "./model.safetensors",
        "model.safetensors/",
        "sub/../model.safetensors",
        "MODEL.SAFETENSORS",
        "model.safetensors\0",
        " model.safetensors",
        "other.bin",
        "file:///etc/passwd",
        "http://127.0.0.1/x",
        "*/_ORT_MEM_ADDR_/*",
        "",
    ],
)
def test_no_other_location_is_allowed(entry, by_hand, location):
    weight = by_hand.tensor_proto("weight", (192, 4), 10, external=entry.external(location=location))
    message = refused(entry.make_graph(weight=weight), entry.weights)
    assert "only model.safetensors is allowed" in message and repr(location) in message


@pytest.mark.parametrize(
    ("dtype", "shape", "changes"),
    [
        (10, (192, 4), {"offset": 0}),  # the header
        (10, (192, 4), {"offset": 8}),
        (10, (192, 4), {"offset": "start + 2"}),
        (10, (192, 4), {"offset": "end"}),
        (10, (192, 4), {"offset": 1 << 62}),
        (10, (192, 4), {"offset": -2}),
        (10, (192, 4), {"offset": "+160"}),
        (10, (192, 4), {"offset": "١٦٠"}),
        (10, (192, 4), {"offset": "0x10"}),
        (10, (192, 4), {"offset": ""}),
        (10, (192, 4), {"length": 0}),
        (10, (192, 4), {"length": 1534}),
        (10, (192, 4), {"length": 1552}),  # into the next tensor
        (10, (192, 4), {"length": 1 << 62}),
        (10, (192, 4), {"length": "1_536"}),
        (10, (191, 4), {"length": 1528}),  # true of the bytes, not of the tensor
        (10, (4, 192), {}),
        (10, (768,), {}),
        (10, (192, 4, 1), {}),
        (10, (-192, -4), {}),
        (10, (), {}),
        (1, (192, 4), {}),
        (1, (96, 4), {}),
        (16, (192, 4), {}),  # bfloat16 has the same width
        (5, (192, 4), {}),  # int16
        (8, (192, 4), {}),  # string
        (0, (192, 4), {}),
        (99, (192, 4), {}),
    ],
)
def test_ranges_types_and_shapes_are_those_of_the_weights_file(entry, by_hand, dtype, shape, changes):
    named = {"start + 2": entry.start + 2, "end": len(entry.weights)}
    external = entry.external(**{key: named.get(value, value) for key, value in changes.items()})
    weight = by_hand.tensor_proto("weight", shape, dtype, external=external)
    message = refused(entry.make_graph(weight=weight), entry.weights)
    assert "'weight' points to bytes" in message and "no tensor of its type and shape lies" in message


def test_a_place_that_is_named_twice_or_by_other_keys_is_refused(entry, by_hand):
    """ONNX Runtime must not find another place than the one that was checked."""
    good = by_hand.tensor_proto("weight", (192, 4), 10, external=entry.external())
    for key, value in (
        ("location", "../x"),
        ("location", "model.safetensors"),
        ("offset", "0"),
        ("length", "1"),
        ("checksum", "0"),
        ("prepacked_0", "MatMul|0;64;0"),
        ("Location", "../x"),
    ):
        pair = by_hand.field(13, by_hand.field(1, key) + by_hand.field(2, value))
        for weight in (good + pair, pair + good):
            refused(entry.make_graph(weight=weight), entry.weights)


def test_a_place_without_a_range_is_refused(entry, by_hand):
    for missing in ("offset", "length", "location"):
        external = {key: value for key, value in entry.external().items() if key != missing}
        weight = by_hand.tensor_proto("weight", (192, 4), 10, external=external)
        refused(entry.make_graph(weight=weight), entry.weights)


def places_for_a_tensor(by_hand, location: str = "../x", offset: int = 0) -> dict[str, tuple[str, bytes]]:
    """Every place of a model where a tensor may stand: its name -> `graph` or `model`, and the bytes to add there."""
    f, node, attribute = by_hand.field, by_hand.node, by_hand.attribute
    external = {"location": location, "offset": offset, "length": 16}
    evil = by_hand.tensor_proto("hidden", (4,), 1, external=external)
    sparse = f(1, evil) + f(3, 4)
    indices = f(1, by_hand.tensor_proto("v", (1,), 1, raw=bytes(4))) + f(2, evil) + f(3, 4)
    subgraph = f(5, evil) + f(2, "branch")
    deeper = f(2, "outer") + f(1, node("If", ["c"], ["y"], attribute("then_branch", subgraph, 5)))
    constant = node("Constant", [], ["k"], attribute("value", evil, 4))

    def with_attribute(number: int, value: bytes, kind: int) -> bytes:
        return f(1, node("Op", [], ["y"], f(1, "a") + f(number, value) + f(20, kind)))

    function = f(1, "Shift") + f(10, "") + f(9, f(1, "") + f(2, 20))
    return {
        "an initializer": ("graph", f(5, evil)),
        "a sparse initializer's values": ("graph", f(15, sparse)),
        "a sparse initializer's indices": ("graph", f(15, indices)),
        "a constant": ("graph", f(1, constant)),
        "a list of tensors": ("graph", with_attribute(10, evil, 9)),
        "a sparse attribute": ("graph", with_attribute(22, sparse, 11)),
        "a list of sparse tensors": ("graph", with_attribute(23, sparse, 12)),
        "a subgraph": ("graph", with_attribute(6, subgraph, 5)),
        "a list of subgraphs": ("graph", with_attribute(11, subgraph, 10)),
        "a subgraph's subgraph": ("graph", with_attribute(6, deeper, 5)),
        "a constant in a subgraph": ("graph", with_attribute(6, f(1, constant) + f(2, "b"), 5)),
        "a function's node": ("model", f(25, function + f(7, constant))),
        "a function's default": ("model", f(25, function + f(11, attribute("a", evil, 4)))),
        "a second graph": ("model", f(7, f(5, evil))),
    }


def names_of_places() -> list[str]:
    from types import SimpleNamespace

    nothing = SimpleNamespace(
        field=lambda *_: b"",
        node=lambda *_: b"",
        attribute=lambda *_: b"",
        tensor_proto=lambda *_, **__: b"",
    )
    return list(places_for_a_tensor(nothing))


@pytest.mark.parametrize("place", names_of_places())
def test_external_data_is_found_wherever_it_hides(entry, by_hand, place):
    where, data = places_for_a_tensor(by_hand)[place]
    graph = entry.make_graph(initializers=data) if where == "graph" else entry.graph + data
    assert "'hidden' points to '../x'" in refused(graph, entry.weights)


def test_packed_dimensions_are_read(entry, by_hand):
    v = by_hand.varint
    body = by_hand.tensor_proto("weight", (), 10, external=entry.external())
    weight = by_hand.field(1, v(192) + v(4)) + body
    check_graph(entry.make_graph(weight=weight), entry.weights, "model.onnx")
    assert "points to bytes" in refused(
        entry.make_graph(weight=by_hand.field(1, v(192) + v(5)) + body), entry.weights
    )


# --- operators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "domain", ["custom", "ai.onnx.contrib", "ai.onnx.ml", "com.microsoft.extensions", "x" * 999]
)
def test_operators_that_need_a_library_are_refused(entry, by_hand, domain):
    f = by_hand.field
    node = f(1, by_hand.node("Evil", ["flat"], ["y"], domain=domain))
    nested = by_hand.attribute("body", node + f(2, "body"), 5)
    function = f(25, f(1, "F") + f(7, by_hand.node("Evil", [], ["y"], domain=domain)))
    for graph in (
        entry.make_graph(nodes=node),
        entry.make_graph(nodes=f(1, by_hand.node("Loop", [], ["y"], nested))),
        entry.make_graph(opsets={"": 20, domain: 1}),
        entry.graph + function,
    ):
        assert f"asks for operators of {domain!r}" in refused(graph, entry.weights)


def test_an_operator_that_loads_a_compiled_engine_by_path_is_refused(entry, by_hand):
    node = by_hand.field(1, by_hand.node("EPContext", ["flat"], ["y"], domain="com.microsoft"))
    assert "asks for operators of 'EPContext'" in refused(entry.make_graph(nodes=node), entry.weights)


def test_the_runtimes_own_operators_are_taken(entry, by_hand):
    node = by_hand.field(1, by_hand.node("FusedMatMul", ["flat", "wide"], ["y"], domain="com.microsoft"))
    graph = entry.make_graph(nodes=node, opsets={"": 20, "ai.onnx": 20, "com.microsoft": 1})
    assert len(check_graph(graph, entry.weights, "model.onnx")) == 2


# --- what is no graph -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"not an onnx file", b"\x08\x0a", b"PK\x03\x04" + bytes(99), b"\xff" * 99]
)
def test_what_is_no_onnx_file(entry, data):
    assert refused(data, entry.weights) == "model.onnx is not an ONNX file; pull the entry again"


def test_onnx_runtimes_own_format_is_refused_even_where_it_is_an_onnx_file_too(entry, by_hand):
    """Told by its fifth to eighth byte, ONNX Runtime would read that format, in which nothing was checked."""
    filler = b"\x7a\x06\0\0ORTM"  # field 15, six bytes: unknown, so a reader of ONNX passes over it
    check_graph(b"\x7a\x06\0\0ORTX" + entry.graph, entry.weights, "model.onnx")
    assert "not an ONNX file" in refused(filler + entry.graph, entry.weights)


def test_subgraphs_nested_without_end_are_refused(entry, by_hand):
    def nested(depth: int) -> bytes:
        graph = by_hand.field(2, "innermost")
        for _ in range(depth):
            graph = by_hand.field(1, by_hand.node("If", [], [], by_hand.attribute("b", graph, 5)))
        return entry.make_graph(nodes=graph)

    check_graph(nested(20), entry.weights, "model.onnx")
    for depth in (40, 3000):
        refused(nested(depth), entry.weights)


def test_a_graph_of_more_than_64_megabytes_is_refused(entry):
    assert "below 64 MB" in refused(bytes((64 << 20) + 1), entry.weights)


def test_every_cut_of_a_graph_is_refused_or_asks_for_less(entry):
    whole = set(check_graph(entry.graph, entry.weights, "model.onnx"))
    for end in range(len(entry.graph)):
        try:
            found = check_graph(entry.graph[:end], entry.weights, "model.onnx")
        except EntryError:
            continue
        assert set(found) < whole


@given(st.binary(max_size=400))
@settings(max_examples=300)
def test_any_bytes_give_an_entry_error(data):
    with pytest.raises(EntryError):
        check_graph(data, b"\x02\0\0\0\0\0\0\0{}", "model.onnx")
    with pytest.raises(EntryError):
        check_graph(b"", data, "model.onnx")


def test_a_mutated_graph_is_refused_or_asks_for_no_other_bytes(default_entry):
    graph = (default_entry / "model.onnx").read_bytes()
    weights = (default_entry / "model.safetensors").read_bytes()
    stored = set(tensor_table(weights, "").values())
    kinds = {10: "F16", 1: "F32", 7: "I64"}
    rng = np.random.default_rng(0)
    passed = 0
    for _ in range(25):
        hurt = bytearray(graph)
        for at in rng.integers(0, len(hurt), rng.integers(1, 4)):
            hurt[at] ^= 1 << rng.integers(0, 8)
        try:
            found = check_graph(bytes(hurt), weights, "model.onnx")
        except EntryError:
            continue
        passed += 1
        for tensor in found:
            assert tensor.location == "model.safetensors"
            row = (kinds[tensor.dtype], tensor.shape, tensor.offset, tensor.offset + tensor.length)
            assert row in stored
    assert passed  # or the test would say nothing


def test_what_the_onnx_package_finds_was_checked(entry, by_hand):
    """A graph with a tensor in every place, and a thousand mutations of it: onnx sees no place that we did not."""
    onnx = pytest.importorskip("onnx")
    from google.protobuf.message import DecodeError

    bias = len(entry.weights) - 16
    places = places_for_a_tensor(by_hand, "model.safetensors", bias).values()
    inner, outer = (b"".join(data for where, data in places if where == kind) for kind in ("graph", "model"))
    graph = entry.make_graph(initializers=inner) + outer

    def messages(message):
        yield message
        for kind, value in message.ListFields():
            if kind.type == kind.TYPE_MESSAGE:
                for item in value if kind.is_repeated else [value]:
                    yield from messages(item)

    def external(model) -> list[tuple]:
        return sorted(
            (
                tensor.name,
                *(dict((p.key, p.value) for p in tensor.external_data)[k] for k in ("location", "offset")),
            )
            for tensor in messages(model)
            if isinstance(tensor, onnx.TensorProto) and tensor.external_data
        )

    rng = np.random.default_rng(1)
    compared = changed = 0
    for turn in range(1000):
        hurt = bytearray(graph)
        for at in rng.integers(0, len(hurt), rng.integers(1, 3) if turn else 0):
            hurt[at] ^= 1 << rng.integers(0, 8)
        try:
            model = onnx.ModelProto.FromString(bytes(hurt))
            found = check_graph(bytes(hurt), entry.weights, "model.onnx")
        except (DecodeError, EntryError):
            continue
        compared += 1
        changed += len(found) < len(places) + 2
        assert external(model) == sorted((t.name, t.location, str(t.offset)) for t in found)
        for message in messages(model):
            if isinstance(message, onnx.NodeProto):
                assert message.domain in ("", "ai.onnx", "com.microsoft")
    assert compared > 100 and changed


# --- weights ----------------------------------------------------------------------------------------------


def test_cut_and_lengthened_weights(entry, by_hand):
    whole = entry.weights
    for end in (0, 1, 7, 8, 9, entry.start - 1, entry.start, entry.start + 1, len(whole) - 1):
        assert "model.safetensors" in refused(entry.graph, whole[:end])
    assert "header of model.safetensors is damaged" in refused(entry.graph, whole + b"\0")


def header(**changes) -> dict:
    first = {"dtype": "F16", "shape": [2, 4], "data_offsets": [0, 16]}
    second = {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}
    return {"a": {**first, **changes}, "b": second}


@pytest.mark.parametrize(
    "lie",
    [
        [],
        5,
        None,
        "text",
        {"a": None},
        {"a": []},
        {"a": {"dtype": "F16", "shape": [2, 4]}},
        header(data_offsets=[0, 8]),  # a gap
        header(data_offsets=[0, 24]),  # an overlap
        header(data_offsets=[16, 0]),
        header(data_offsets=[-16, 0]),
        header(data_offsets=[0, 1 << 70]),
        header(data_offsets=[0]),
        header(data_offsets=[]),
        header(data_offsets=None),
        header(data_offsets="00"),
        header(data_offsets=[0.0, 16.0]),
        header(data_offsets=["0", "16"]),
        header(shape=None),
        header(shape=["2", "4"]),
        header(shape=[2.0, 4.0]),
        header(shape=[[2], [4]]),
        b'{"a"',
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"a":' * 50_000,
    ],
)
def test_headers_that_are_damaged_or_do_not_tile_the_file(by_hand, lie):
    with pytest.raises(EntryError, match=r"^x: the header of model.safetensors is damaged"):
        tensor_table(by_hand.raw_safetensors(lie, bytes(32)), "x")


def test_header_lengths_that_lie(entry):
    for length in (len(entry.weights), 1 << 30, 1 << 63, (1 << 64) - 1):
        data = length.to_bytes(8, "little") + entry.weights[8:]
        assert "cut or not a safetensors file" in refused(entry.graph, data)


def test_a_graph_and_a_header_that_agree_on_a_lie_are_refused(entry, by_hand):
    """Both say 192 x 4 halves in 800 bytes: ONNX Runtime would read past them."""
    table = {
        "weight": {"dtype": "F16", "shape": [192, 4], "data_offsets": [0, 800]},
        "bias": {"dtype": "F32", "shape": [4], "data_offsets": [800, 816]},
    }
    weights = by_hand.raw_safetensors(table, bytes(816))
    start = len(weights) - 816
    weight = by_hand.tensor_proto("weight", (192, 4), 10, external=entry.external(offset=start, length=800))
    graph = by_hand.model_proto(by_hand.field(5, weight))
    assert "points to bytes" in refused(graph, weights)
    huge = {"w": {"dtype": "F16", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 0]}}
    weights = by_hand.raw_safetensors(huge, b"")
    place = {"location": "model.safetensors", "offset": len(weights), "length": 0}
    weight = by_hand.tensor_proto("w", (1 << 40, 1 << 40), 10, external=place)
    refused(by_hand.model_proto(by_hand.field(5, weight)), weights)


def test_an_empty_tensor_beside_another_is_no_lie(by_hand):
    weights = by_hand.safetensors_bytes({"none": np.zeros((0, 3), "f4"), "some": np.ones(2, "f4")})
    start = len(weights) - 8
    tensors = [
        by_hand.tensor_proto(
            name, shape, 1, external={"location": "model.safetensors", "offset": start, "length": n}
        )
        for name, shape, n in (("none", (0, 3), 0), ("some", (2,), 8))
    ]
    graph = by_hand.model_proto(b"".join(by_hand.field(5, tensor) for tensor in tensors))
    assert [tensor.name for tensor in check_graph(graph, weights, "x")] == ["none", "some"]
