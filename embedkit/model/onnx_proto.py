"""ONNX files as canonical protobuf: a file is read in full or refused, so that every parser reads the same graph.

Protobuf parsers differ where the format is ambiguous: in how they truncate a tag of more than 32 bits, in which of two
values of one field they keep, and in how they treat unknown fields. Such a file could show one graph to a check and
another one to ONNX Runtime. Only the form that protobuf's own writers emit is accepted: the fields of `onnx.proto3` (of
onnx 1.23) with their exact wire types, minimal varints, and singular fields at most once. The `onnx` package reproduces
such a file byte for byte, up to the order of fields, which has no meaning; the tests check that.

The tables omit what no encoder needs, so it is refused: values other than tensors (sequences, maps, optionals),
segments of tensors, and device assignments.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

#: A message: field name -> value, or a list of values for a repeated field. Fields that are not there are not in it.
Message: TypeAlias = dict[str, Any]

#: Greatest number of fields of a file; the zoo's largest graph has 18 thousand. Bounds the memory of many tiny fields.
MOST_FIELDS = 1_000_000

# A kind with `*` is repeated, one tag per value; with `[]` it is packed.
# A `message` is counted and not parsed: callers refuse a file that has one.
_FIELDS = {
    "Model": "1 ir_version int64, 2 producer_name string, 3 producer_version string, 4 domain string,"
    " 5 model_version int64, 6 doc_string string, 7 graph Graph, 8 opset_import OperatorSet*,"
    " 14 metadata_props Pair*, 20 training_info message*, 25 functions message*",
    "OperatorSet": "1 domain string, 2 version int64",
    "Pair": "1 key string, 2 value string",
    "Graph": "1 node Node*, 2 name string, 5 initializer Tensor*, 10 doc_string string, 11 input Value*,"
    " 12 output Value*, 13 value_info Value*, 14 quantization_annotation Annotation*,"
    " 15 sparse_initializer message*, 16 metadata_props Pair*",
    "Node": "1 input string*, 2 output string*, 3 name string, 4 op_type string, 5 attribute Attribute*,"
    " 6 doc_string string, 7 domain string, 8 overload string, 9 metadata_props Pair*",
    "Attribute": "1 name string, 2 f float, 3 i int64, 4 s bytes, 5 t Tensor, 6 g message, 7 floats float*,"
    " 8 ints int64*, 9 strings bytes*, 10 tensors Tensor*, 11 graphs message*, 13 doc_string string,"
    " 20 type enum14, 21 ref_attr_name string, 22 sparse_tensor message, 23 sparse_tensors message*",
    "Tensor": "1 dims int64*, 2 data_type int32, 4 float_data float[], 5 int32_data int32[], 6 string_data bytes*,"
    " 7 int64_data int64[], 8 name string, 9 raw_data bytes, 10 double_data double[], 11 uint64_data uint64[],"
    " 12 doc_string string, 13 external_data Pair*, 14 data_location enum1, 16 metadata_props Pair*",
    "Annotation": "1 tensor_name string, 2 quant_parameter_tensor_names Pair*",
    "Value": "1 name string, 2 type Type, 3 doc_string string, 4 metadata_props Pair*",
    "Type": "1 tensor_type TensorType, 6 denotation string",
    "TensorType": "1 elem_type int32, 2 shape Shape",
    "Shape": "1 dim Dimension*",
    "Dimension": "1 dim_value int64, 2 dim_param string, 3 denotation string",
}

#: A message has at most one of these fields.
_ONE_OF = {"Dimension": ("dim_value", "dim_param")}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRES = {
    "int64": _VARINT,
    "int32": _VARINT,
    "uint64": _VARINT,
    "enum1": _VARINT,
    "enum14": _VARINT,
    "float": _FIXED32,
    "double": _FIXED64,
}
_WIDTHS = {"float": 4, "double": 8}


class _Field(NamedTuple):
    name: str
    kind: str
    wire: int
    repeated: bool
    packed: bool


def _parse_table(text: str) -> dict[int, _Field]:
    table = {}
    for row in text.split(","):
        number, name, kind = row.split()
        plain = kind.removesuffix("*").removesuffix("[]")
        packed = kind.endswith("[]")
        wire = _BYTES if packed else _WIRES.get(plain, _BYTES)
        table[int(number)] = _Field(name, plain, wire, kind.endswith("*"), packed)
    return table


_TABLES = {name: _parse_table(text) for name, text in _FIELDS.items()}


def read_model(data: bytes) -> Message:
    """Read an ONNX file as nested messages.

    Args:
        data: The whole file.

    Returns:
        The ModelProto: text as `str`, bytes as views of `data`, numbers as `int`; `float` and `double` values as
        their 4 or 8 bytes, packed floats as one view.

    Raises:
        ValueError: It is not a canonical ONNX file; the message names the field.
    """
    return _Reader().message(memoryview(data), "Model")


class _Reader:
    def __init__(self) -> None:
        self._left = MOST_FIELDS

    def message(self, data: memoryview, kind: str) -> Message:
        fields = _TABLES[kind]
        found: Message = {}
        at = 0
        while at < len(data):
            key, at = _varint(data, at, kind)
            number = key >> 3
            field = fields.get(number)
            if field is None or field.wire != key & 7:
                raise ValueError(f"{kind}: field {number} of wire type {key & 7} is unknown")
            if field.name in found and not field.repeated:
                raise ValueError(f"{kind}: {field.name} occurs twice")
            self._count(1, kind)
            if field.wire == _VARINT:
                number, at = _varint(data, at, kind)
                value: Any = _integer(number, field.kind, f"{kind}.{field.name}")
            else:
                if field.wire == _BYTES:
                    size, at = _varint(data, at, kind)
                else:
                    size = _WIDTHS[field.kind]
                if size > len(data) - at:
                    raise ValueError(f"{kind}.{field.name} is truncated")
                value = self._value(data[at : at + size], field, f"{kind}.{field.name}")
                at += size
            if field.repeated:
                found.setdefault(field.name, []).append(value)
            else:
                found[field.name] = value
        several = [name for name in _ONE_OF.get(kind, ()) if name in found]
        if len(several) > 1:
            raise ValueError(f"{kind}: {' and '.join(several)} exclude each other")
        return found

    def _value(self, data: memoryview, field: _Field, where: str) -> Any:
        if field.packed:
            return self._packed(data, field.kind, where)
        if field.kind in _TABLES:
            return self.message(data, field.kind)
        if field.kind == "string":
            try:
                return str(data, "utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{where} is not UTF-8") from None
        return data

    def _packed(self, data: memoryview, kind: str, where: str) -> Any:
        if not data:
            raise ValueError(f"{where} is packed and empty")  # a writer omits the field
        if kind in _WIDTHS:
            if len(data) % _WIDTHS[kind]:
                raise ValueError(f"{where} is truncated")
            return data
        values, at = [], 0
        while at < len(data):
            self._count(1, where)
            number, at = _varint(data, at, where)
            values.append(_integer(number, kind, where))
        return values

    def _count(self, fields: int, where: str) -> None:
        self._left -= fields
        if self._left < 0:
            raise ValueError(f"{where}: the file has more than {MOST_FIELDS} fields")


def _varint(data: memoryview, at: int, where: str) -> tuple[int, int]:
    """Read a varint in its shortest form, and the position after it."""
    value = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if (byte == 0 and shift) or value >> 64:
                raise ValueError(f"{where}: a number is not in its shortest form")
            return value, at
        shift += 7
    raise ValueError(f"{where}: a number is truncated or longer than ten bytes")


def _integer(value: int, kind: str, where: str) -> int:
    """The number of a varint. Negative numbers are 64-bit two's complement, also for int32 and enums."""
    if kind == "uint64":
        return value
    signed = value - (1 << 64) if value >> 63 else value
    if kind == "int32" and not -(1 << 31) <= signed < 1 << 31:
        raise ValueError(f"{where}: {signed} is not a 32-bit number")
    # A proto2 parser treats an unknown enum value as if the field were missing.
    if kind.startswith("enum") and not 0 <= signed <= int(kind[4:]):
        raise ValueError(f"{where}: {signed} is not a value of this field")
    return signed
