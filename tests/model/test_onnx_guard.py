"""The look into a graph before it runs: what it takes, and everything that it has to refuse."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.errors import EntryError
from embedkit.model.onnx_guard import ExternalTensor, check_graph, tensor_table
from embedkit.model.onnx_proto import _TABLES, _varint, read_model


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
    assert "'weight' points to bytes" in message and "there is no tensor of its type and shape" in message


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
    """Every place of a model where a tensor may stand: its name -> the argument of `make_graph`, and its bytes."""
    f, node, attribute = by_hand.field, by_hand.node, by_hand.attribute
    external = {"location": location, "offset": offset, "length": 16}
    evil = by_hand.tensor_proto("hidden", (4,), 1, external=external)
    sparse = f(1, evil) + f(3, 4)
    indices = f(1, by_hand.tensor_proto("v", (1,), 1, raw=bytes(4))) + f(2, evil) + f(3, 4)
    subgraph = f(2, "branch") + f(5, evil)
    deeper = f(1, node("If", ["c"], ["y"], attribute("then_branch", subgraph, 5))) + f(2, "outer")
    constant = node("Constant", [], ["k"], attribute("value", evil, 4))

    def with_attribute(number: int, value: bytes, kind: int) -> bytes:
        parts = [f(1, "a"), f(number, value), f(20, kind)]
        return f(1, node("Op", [], ["y"], b"".join(parts if number < 20 else [parts[0], parts[2], parts[1]])))

    function = f(1, "Shift") + f(7, constant) + f(9, f(1, "") + f(2, 20)) + f(10, "")
    default = f(1, "Shift") + f(10, "") + f(11, attribute("a", evil, 4))
    return {
        "an initializer": ("initializers", f(5, evil)),
        "a constant": ("nodes", f(1, constant)),
        "a list of tensors": ("nodes", with_attribute(10, evil, 9)),
        "a sparse initializer's values": ("rest", f(15, sparse)),
        "a sparse initializer's indices": ("rest", f(15, indices)),
        "a sparse attribute": ("nodes", with_attribute(22, sparse, 11)),
        "a list of sparse tensors": ("nodes", with_attribute(23, sparse, 12)),
        "a subgraph": ("nodes", with_attribute(6, subgraph, 5)),
        "a list of subgraphs": ("nodes", with_attribute(11, subgraph, 10)),
        "a subgraph's subgraph": ("nodes", with_attribute(6, deeper, 5)),
        "a constant in a subgraph": ("nodes", with_attribute(6, f(1, constant) + f(2, "b"), 5)),
        "a function's node": ("model", f(25, function)),
        "a function's default": ("model", f(25, default)),
        "a graph for training": ("model", f(20, f(1, f(2, "g") + f(5, evil)))),
        "a second graph": ("model", f(7, f(2, "g") + f(5, evil))),
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
def test_external_data_is_found_or_its_hiding_place_refused(entry, by_hand, place):
    where, data = places_for_a_tensor(by_hand)[place]
    graph = entry.graph + data if where == "model" else entry.make_graph(**{where: data})
    expected = {
        "an initializer": "'hidden' points to '../x'",
        "a constant": "'hidden' points to '../x'",
        "a list of tensors": "'hidden' points to '../x'",
        "a graph for training": "holds a graph for training",
        "a second graph": "graph occurs twice",
    }
    kind = (
        "sparse tensors"
        if "sparse" in place
        else "holds functions"
        if "function" in place
        else "control flow"
    )
    assert expected.get(place, kind) in refused(graph, entry.weights)


def test_a_tensor_that_is_external_for_one_reader_alone_is_refused(entry, by_hand):
    """Readers look at `data_location`, at `external_data`, or at both."""
    f, good = by_hand.field, by_hand.tensor_proto("weight", (192, 4), 10, external=entry.external())
    for weight in (
        good.removesuffix(f(14, 1)),
        good.removesuffix(f(14, 1)) + f(14, 0),
        by_hand.tensor_proto("weight", (192, 4), 10, raw=bytes(1536)) + f(14, 1),
    ):
        message = refused(entry.make_graph(weight=weight), entry.weights)
        assert "'weight' is ambiguous about whether its data are external" in message


# --- one form ---------------------------------------------------------------------------------------------


def long_varint(value: int, length: int) -> bytes:
    """A varint of more bytes than it takes."""
    return bytes([value >> 7 * i & 0x7F | (0x80 if i < length - 1 else 0) for i in range(length)])


def loose_forms(by_hand) -> dict[str, bytes]:
    """A TensorProto that some parser takes for `weight` of the entry, or for something else: form -> its bytes."""
    f, v = by_hand.field, by_hand.varint
    dims, kind, name = f(1, 192) + f(1, 4), f(2, 10), f(8, "weight")
    raw = f(9, bytes(1536))
    pair = f(1, "location") + f(2, "secret.bin")

    def tensor(
        after: bytes = b"", *, dims: bytes = dims, kind: bytes = kind, name: bytes = name, raw: bytes = raw
    ):
        return dims + kind + name + raw + after

    return {
        "a tag with bit 32 set": tensor(long_varint((13 << 3 | 2) | 1 << 32, 5) + v(len(pair)) + pair),
        "a tag of two bytes that fits one": tensor(long_varint(13 << 3 | 2, 2) + v(len(pair)) + pair),
        "a tag of ten bytes": tensor(long_varint((13 << 3 | 2) | 1 << 62, 10) + v(len(pair)) + pair),
        "a length of two bytes that fits one": tensor(v(13 << 3 | 2) + long_varint(len(pair), 2) + pair),
        "a value of two bytes that fits one": tensor(kind=v(2 << 3) + long_varint(10, 2)),
        "a value of eleven bytes": tensor(kind=v(2 << 3) + long_varint(10, 11)),
        "a value of 70 bits": tensor(kind=v(2 << 3) + b"\x8a" + b"\x80" * 8 + b"\x02"),
        "field 0": tensor(b"\x00\x01"),
        "an unknown field": tensor(f(15, 1)),
        "a field of a later version": tensor(f(99, 1)),
        "a segment": tensor(kind=kind + f(3, f(1, 0) + f(2, 1))),
        "a group": tensor(v(13 << 3 | 3) + pair + v(13 << 3 | 4)),
        "a number where bytes belong": tensor(raw=v(9 << 3) + v(1)),
        "bytes where a number belongs": tensor(kind=f(2, b"\x0a")),
        "a fixed number where a varint belongs": tensor(kind=v(2 << 3 | 5) + b"\x0a\0\0\0"),
        "a name that stands twice": tensor(name=name + f(8, "bias")),
        "packed dimensions": tensor(dims=f(1, v(192) + v(4))),
        "an empty packed field": tensor(kind=kind + f(4, b"")),
        "numbers that are not packed": tensor(kind=kind + f(5, 1)),
        "packed floats that are cut": tensor(kind=kind + f(4, bytes(5))),
        "packed numbers that are cut": tensor(kind=kind + f(7, b"\x80")),
        "packed numbers of several forms": tensor(kind=kind + f(7, long_varint(1, 2))),
        "a type of 33 bits": tensor(kind=f(2, (1 << 32) + 10)),
        "a name that is not UTF-8": tensor(name=f(8, b"\xff")),
        "an unknown data location": tensor(f(14, 2)),
        "cut": tensor()[:-1],
        "cut in a tag": tensor(b"\xf2"),
        "longer than everything": tensor(v(13 << 3 | 2) + v(1 << 63)),
    }


class _Nothing:
    @staticmethod
    def field(*_):
        return b""

    varint = field


@pytest.mark.parametrize("form", loose_forms(_Nothing))
def test_every_loose_form_is_refused(entry, by_hand, form):
    """In a tensor, and as it stands in the model itself: there is one check for all messages."""
    good = entry.make_graph(weight=by_hand.tensor_proto("weight", (192, 4), 10, raw=bytes(1536)))
    check_graph(good, entry.weights, "model.onnx")
    graph = entry.make_graph(weight=loose_forms(by_hand)[form])
    assert "is not an ONNX file (Tensor" in refused(graph, entry.weights)


def test_dimensions_and_types_say_one_thing(entry, by_hand):
    f = by_hand.field
    two = f(1, f(1, 8) + f(2, "N"))
    value = f(1, "x") + f(2, f(1, f(1, 1) + f(2, two)))
    assert "dim_value and dim_param exclude each other" in refused(
        entry.make_graph(rest=f(13, value)), entry.weights
    )
    sequence = f(1, "x") + f(2, f(4, f(1, f(1, f(1, 1)))))
    assert "Type: field 4" in refused(entry.make_graph(rest=f(13, sequence)), entry.weights)


def test_a_file_of_very_many_fields_is_refused_before_it_takes_memory(entry, by_hand, monkeypatch):
    monkeypatch.setattr("embedkit.model.onnx_proto.MOST_FIELDS", 1000)
    check_graph(entry.graph, entry.weights, "model.onnx")
    assert "more than 1000 fields" in refused(
        entry.make_graph(nodes=by_hand.field(1, b"") * 1000), entry.weights
    )
    packed = (
        by_hand.tensor_proto("p", (1000,), 7)[:-3] + by_hand.field(7, bytes(1000)) + by_hand.field(8, "p")
    )
    assert "more than 1000 fields" in refused(
        entry.make_graph(initializers=by_hand.field(5, packed)), entry.weights
    )


def everything(entry, by_hand) -> bytes:
    """A model with a message of each kind that is accepted, and a field of each type."""
    f, node = by_hand.field, by_hand.node
    floats = f(1, "f") + b"\x15\0\0\x80\x3f" + f(20, 1)
    lists = f(1, "l") + b"\x3d\0\0\x80\x3f" * 2 + f(8, -1) + f(8, 300) + f(9, "s") + f(9, b"\xff") + f(20, 6)
    text = f(1, "t") + f(4, b"\xfe") + f(13, "doc") + f(20, 3)
    numbers = f(1, 2) + f(2, 1) + f(4, bytes(8)) + f(5, by_hand.varint(-1)) + f(6, b"x")
    numbers += (
        f(7, by_hand.varint(7)) + f(8, "n") + f(10, bytes(8)) + f(11, by_hand.varint(1 << 63)) + f(12, "doc")
    )
    pair = f(1, "key") + f(2, "value")
    value = f(1, "sum") + f(2, f(1, f(1, 1) + f(2, f(1, f(2, "N")) + f(1, f(1, 4) + f(3, "d")))) + f(6, "t"))
    rest = f(13, value + f(3, "doc") + f(4, pair)) + f(14, f(1, "sum") + f(2, pair)) + f(16, pair)
    nodes = f(1, node("Op", ["sum"], ["y"], floats, lists, text) + f(9, pair))
    body = entry.graph_proto(nodes=nodes, initializers=f(5, numbers + f(16, pair))) + rest
    model = by_hand.model_proto(body, opsets={"": 20, "com.microsoft": 1})
    return (
        f(1, 10) + f(2, "producer") + f(3, "1") + f(4, "d") + f(5, 1) + f(6, "doc") + model[2:] + f(14, pair)
    )


@pytest.fixture(scope="module")
def onnx_model():
    """`onnx_model(bytes)`: parsed by the onnx package, None where that refuses."""
    onnx = pytest.importorskip("onnx")
    from google.protobuf.message import DecodeError

    def parse(data: bytes):
        try:
            return onnx.ModelProto.FromString(data)
        except DecodeError:
            return None

    return parse


def in_order(data: bytes, kind: str = "Model") -> bytes:
    """The fields of a message, and of those in it, by their numbers; it must be canonical."""
    parts, at = [], 0
    while at < len(data):
        start = at
        key, at = _varint(memoryview(data), at, kind)
        field = _TABLES[kind][key >> 3]
        if field.wire == 0:
            at = _varint(memoryview(data), at, kind)[1]
            parts.append((key, data[start:at]))
            continue
        size, at = _varint(memoryview(data), at, kind) if field.wire == 2 else ({5: 4, 1: 8}[field.wire], at)
        value = data[at : at + size]
        parts.append(
            (key, data[start:at] + (in_order(value, field.kind) if field.kind in _TABLES else value))
        )
        at += size
    return b"".join(part for _, part in sorted(parts, key=lambda pair: pair[0]))


def test_the_order_of_fields_means_nothing(entry, by_hand, onnx_model):
    """Some writers follow the order of the declaration, in which operator sets stand before the graph."""
    f = by_hand.field
    body = entry.graph_proto()
    graph = f(8, f(2, 20)) + f(7, body) + f(1, 10)
    assert check_graph(graph, entry.weights, "x") == check_graph(entry.graph, entry.weights, "x")
    assert onnx_model(graph).SerializeToString() == in_order(graph) != graph


def test_the_tables_are_those_of_onnx():
    onnx = pytest.importorskip("onnx")
    names = {
        "OperatorSet": "OperatorSetIdProto", "Pair": "StringStringEntryProto", "Annotation": "TensorAnnotation",
        "Value": "ValueInfoProto", "Shape": "TensorShapeProto", "Dimension": "TensorShapeProto.Dimension",
        "TensorType": "TypeProto.Tensor",
    }  # fmt: skip
    types = {
        1: "double",
        2: "float",
        3: "int64",
        4: "uint64",
        5: "int32",
        9: "string",
        11: "message",
        12: "bytes",
    }
    types[14] = "enum"
    for ours, table in _TABLES.items():
        theirs = onnx
        for part in names.get(ours, f"{ours}Proto").split("."):
            theirs = getattr(theirs, part)
        fields = {field.number: field for field in theirs.DESCRIPTOR.fields}
        for number, field in table.items():
            there = fields[number]
            assert field.name == there.name, (ours, number)
            kind = "message" if field.kind in _TABLES else re.sub("(?<=enum)[0-9]+", "", field.kind)
            assert types[there.type] == kind, (ours, field)
            assert (field.repeated or field.packed) == there.is_repeated, (ours, field)
            assert field.packed == (there.is_repeated and there.is_packed), (ours, field)
            if field.kind.startswith("enum"):
                assert sorted(there.enum_type.values_by_number) == list(range(int(field.kind[4:]) + 1))


def test_every_bit_flip_is_refused_or_written_back_as_it_is(entry, by_hand, onnx_model):
    """No byte of an accepted file is one that another parser would leave out, merge or understand differently."""
    good = everything(entry, by_hand)
    check_graph(good, entry.weights, "model.onnx")
    assert onnx_model(good).SerializeToString() == good
    accepted = 0
    for at in range(len(good)):
        for bit in range(8):
            hurt = bytes([*good[:at], good[at] ^ 1 << bit, *good[at + 1 :]])
            theirs = onnx_model(hurt)
            try:
                check_graph(hurt, entry.weights, "model.onnx")
            except EntryError as error:
                reason = str(error)
            else:
                accepted += 1
                assert theirs is not None and theirs.SerializeToString() == in_order(hurt), (at, bit)
                continue
            if theirs is not None:  # what onnx itself would write of it is accepted
                theirs.DiscardUnknownFields()
                try:
                    read_model(theirs.SerializeToString())
                except ValueError as error:
                    assert "is unknown" in str(error) or "UTF-8" in str(error), (reason, error)
    assert accepted > 500


GRAPHS = sorted(Path(__file__).parents[2].joinpath("zoo").glob("*/model.onnx"))


@pytest.mark.skipif(not GRAPHS, reason="no zoo beside the tests")
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_mutations_of_real_graphs_are_refused_or_written_back_as_they_are(onnx_model, data):
    """Bytes changed, cut out, doubled and moved in the zoo's own graphs."""
    file = data.draw(st.sampled_from(GRAPHS), label="file")
    graph, weights = file.read_bytes(), file.with_name("model.safetensors").read_bytes()
    for _ in range(data.draw(st.integers(0, 3))):
        at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(graph))] * 2)))
        end = min(end, at + 40)
        piece = data.draw(st.one_of(st.binary(max_size=12), st.just(graph[at:end] * 2), st.just(b"")))
        graph = graph[:at] + piece + graph[end:]
    try:
        check_graph(graph, weights, "model.onnx")
    except EntryError:
        return
    assert onnx_model(graph).SerializeToString() == in_order(graph)


def test_what_onnx_runtime_writes_is_read(default_entry, tmp_path):
    """A graph after ONNX Runtime's own optimizations, by its C++ writer."""
    from embedkit.model.providers import onnxruntime

    ort = onnxruntime()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    weights = (default_entry / "model.safetensors").read_bytes()
    options.add_external_initializers_from_files_in_memory(["model.safetensors"], [weights], [len(weights)])
    ort.InferenceSession(
        (default_entry / "model.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    model = read_model((tmp_path / "optimized.onnx").read_bytes())
    assert model["graph"]["output"][0]["name"] == "embedding"


# --- how much ---------------------------------------------------------------------------------------------


def sized(by_hand) -> dict[str, tuple[bytes, bytes]]:
    """Graphs of some hundred bytes that ask for gigabytes: nodes and initializers."""
    f, node, v = by_hand.field, by_hand.node, by_hand.varint

    def constant(name: str, values, dtype: int = 7) -> bytes:
        raw = np.array(values, {7: "<i8", 6: "<i4", 1: "<f4"}[dtype]).tobytes()
        return f(5, by_hand.tensor_proto(name, np.shape(values), dtype, raw=raw))

    large = constant("large", [600, 1_000_000])
    unpacked = f(5, f(1, 2) + f(2, 7) + f(7, v(600) + v(1_000_000)) + f(8, "large"))
    in_node = f(1, node("Constant", [], ["large"], f(1, "value_ints") + f(8, 1 << 20) * 2 + f(20, 7)))
    as_tensor = by_hand.tensor_proto("", (2,), 7, raw=np.array([1 << 20] * 2, "<i8").tobytes())
    as_value = f(1, node("Constant", [], ["large"], by_hand.attribute("value", as_tensor, 4)))
    random = f(1, "shape") + f(8, 1 << 30) + f(20, 7)
    fill, expand = (
        f(1, node("ConstantOfShape", ["large"], ["y"])),
        f(1, node("Expand", ["sum", "large"], ["y"])),
    )
    return {
        "filled": (fill, large),
        "filled, packed numbers": (fill, unpacked),
        "filled, a constant node": (in_node + fill, b""),
        "expanded": (expand, large),
        "expanded, a constant tensor": (as_value + expand, b""),
        "tiled": (f(1, node("Tile", ["sum", "large"], ["y"])), large),
        "padded": (f(1, node("Pad", ["sum", "large"], ["y"])), large),
        "resized": (f(1, node("Resize", ["sum", "", "", "large"], ["y"])), large),
        "scaled": (f(1, node("Resize", ["sum", "", "large"], ["y"])), constant("large", [1e5, 1e5], 1)),
        "scaled without end": (
            f(1, node("Resize", ["sum", "", "large"], ["y"])),
            constant("large", [np.inf], 1),
        ),
        "one of very many": (f(1, node("OneHot", ["sum", "large"], ["y"])), constant("large", 1 << 30)),
        "a range": (
            f(1, node("Range", ["from", "to", "by"], ["y"])),
            constant("from", 0) + constant("to", 1 << 40) + constant("by", 1),
        ),
        "random numbers": (f(1, node("RandomNormal", [], ["y"], random)), b""),
    }


@pytest.mark.parametrize("what", [*sized(SimpleNamespace(
    field=lambda *_: b"", node=lambda *_: b"", varint=lambda *_: b"", attribute=lambda *_: b"",
    tensor_proto=lambda *_, **__: b""))])  # fmt: skip
def test_a_constant_that_asks_for_gigabytes_is_refused(entry, by_hand, what):
    nodes, initializers = sized(by_hand)[what]
    graph = entry.make_graph(nodes=nodes, initializers=initializers)
    assert "numbers at once" in refused(graph, entry.weights)


def test_constants_of_ordinary_size_are_taken(entry, by_hand):
    f, node = by_hand.field, by_hand.node
    shape = f(5, by_hand.tensor_proto("s", (4,), 7, raw=np.array([1, -1, 224, 224], "<i8").tobytes()))
    for op in ("ConstantOfShape", "Expand", "Tile", "Pad", "Resize", "Reshape"):
        inputs = {"ConstantOfShape": ["s"], "Resize": ["sum", "", "", "s"]}.get(op, ["sum", "s"])
        nodes = f(1, node(op, inputs, ["y"]))
        check_graph(entry.make_graph(nodes=nodes, initializers=shape), entry.weights, "model.onnx")


# --- operators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "domain", ["custom", "ai.onnx.contrib", "ai.onnx.ml", "com.microsoft.extensions", "x" * 999]
)
def test_operators_that_need_a_library_are_refused(entry, by_hand, domain):
    f = by_hand.field
    node = f(1, by_hand.node("Evil", ["flat"], ["y"], domain=domain))
    for graph in (entry.make_graph(nodes=node), entry.make_graph(opsets={"": 20, domain: 1})):
        assert f"uses operators of {domain!r}" in refused(graph, entry.weights)


@pytest.mark.parametrize("op", ["If", "Loop", "Scan", "SequenceMap", "BeamSearch", "Anything"])
@pytest.mark.parametrize("number", [6, 11])
def test_control_flow_is_refused(entry, by_hand, op, number):
    """A Loop of 2^62 turns never ends, and ONNX Runtime cannot be interrupted."""
    f = by_hand.field
    body = f(1, "body") + f(number, f(2, "g")) + f(20, 5 if number == 6 else 10)
    message = refused(entry.make_graph(nodes=f(1, by_hand.node(op, ["flat"], ["y"], body))), entry.weights)
    assert f"the operator {op!r} holds a graph, and control flow" in message


def test_options_for_onnx_runtime_are_refused(entry, by_hand):
    pair = by_hand.field(1, "ort_config") + by_hand.field(2, "{}")
    assert "holds options for ONNX Runtime" in refused(entry.graph + by_hand.field(14, pair), entry.weights)


@pytest.mark.parametrize("op", ["EPContext", "PythonOp"])
def test_an_operator_that_runs_what_the_graph_does_not_hold_is_refused(entry, by_hand, op):
    """A compiled engine by its path, and a function of the host process."""
    node = by_hand.field(1, by_hand.node(op, ["flat"], ["y"], domain="com.microsoft"))
    assert f"uses operators of {op!r}" in refused(entry.make_graph(nodes=node), entry.weights)


def test_the_runtimes_own_operators_are_taken(entry, by_hand):
    node = by_hand.field(1, by_hand.node("FusedMatMul", ["flat", "wide"], ["y"], domain="com.microsoft"))
    graph = entry.make_graph(nodes=node, opsets={"": 20, "ai.onnx": 20, "com.microsoft": 1})
    assert len(check_graph(graph, entry.weights, "model.onnx")) == 2


# --- what is no graph -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"not an onnx file", b"\x08\x0a", b"PK\x03\x04" + bytes(99), b"\xff" * 99]
)
def test_what_is_no_onnx_file(entry, data):
    message = refused(data, entry.weights)
    assert message.startswith("model.onnx is not an ONNX file (") and message.endswith(
        "); pull the entry again"
    )


def test_onnx_runtimes_own_format_is_refused_even_where_it_is_an_onnx_file_too(entry, by_hand):
    """Told by its fifth to eighth byte, ONNX Runtime would read that format, in which nothing was checked."""
    for mark, expected in ((b"ORTM", "not an ONNX file (ORT format)"), (b"ORTX", "")):
        graph = entry.graph[:2] + by_hand.field(2, mark) + entry.graph[2:]
        assert graph[4:8] == mark
        if expected:
            assert expected in refused(graph, entry.weights)
        else:
            check_graph(graph, entry.weights, "model.onnx")


def test_a_graph_of_more_than_64_megabytes_is_refused(entry):
    assert "below 64 MB" in refused(bytes((64 << 20) + 1), entry.weights)


def test_every_cut_of_a_graph_is_refused(entry):
    """A model that ends before its operator sets is whole; ONNX Runtime refuses it for want of them."""
    for end in range(len(entry.graph) - 4):
        refused(entry.graph[:end], entry.weights)


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
        assert "truncated or not a safetensors file" in refused(entry.graph, data)


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
