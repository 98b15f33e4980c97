"""The event file, read back by protobuf itself from TensorFlow's published definitions, and by its checksums."""

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from training.events import Events, crc32c
from training.runs import Epoch

HISTORY = [Epoch(n, 2 / n, 0.5, 2.1 / n, 0.9 - 1 / (n + 2), 1.5, 2000.0) for n in range(1, 301)]


def event_class() -> Any:
    """`Event`, `Summary` and `Value` as far as scalars need them, by TensorFlow's .proto files."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", syntax="proto3")
    for name, fields in {
        "Value": [("tag", 1, field.TYPE_STRING, ""), ("simple_value", 2, field.TYPE_FLOAT, "")],
        "Summary": [("value", 1, field.TYPE_MESSAGE, ".Value")],
        "Event": [
            ("wall_time", 1, field.TYPE_DOUBLE, ""),
            ("step", 2, field.TYPE_INT64, ""),
            ("file_version", 3, field.TYPE_STRING, ""),
            ("summary", 5, field.TYPE_MESSAGE, ".Summary"),
        ],
    }.items():
        message = file.message_type.add(name=name)
        for label, number, kind, of in fields:
            many = field.LABEL_REPEATED if label == "value" else field.LABEL_OPTIONAL
            message.field.add(name=label, number=number, type=kind, type_name=of or None, label=many)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Event"))


def read(path: Path) -> list[Any]:
    data, events, event = path.read_bytes(), [], event_class()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for part, kept in ((data[:8], data[8:12]), (data[12 : 12 + length], data[12 + length : 16 + length])):
            crc = crc32c(part)
            assert struct.unpack("<I", kept)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
        events.append(event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


@pytest.mark.parametrize(
    ("data", "checksum"), [(bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"123456789", 0xE3069283)]
)
def test_the_checksum_is_that_of_rfc_3720(data, checksum):
    assert crc32c(data) == checksum


def test_a_run_that_was_resumed_has_one_file_with_every_epoch_once(tmp_path):
    begun = Events(tmp_path)
    for epoch in HISTORY[:200]:
        begun.append(epoch)
    (earlier,) = tmp_path.iterdir()
    resumed = Events(tmp_path, HISTORY[:200])
    assert earlier.exists(), "an earlier curve went before there was a new one"
    for epoch in HISTORY[200:]:
        resumed.append(epoch)
    (path,) = tmp_path.iterdir()
    assert "tfevents" in path.name
    first, *events = read(path)
    assert first.file_version == "brain.Event:2"
    assert [event.step for event in events] == list(range(1, 301))
    assert all(later.wall_time > earlier.wall_time for earlier, later in pairwise(events[:200]))
    told = {value.tag: value.simple_value for value in events[199].summary.value}
    assert told == pytest.approx(
        {
            "loss/train": 0.01,
            "accuracy/train": 0.5,
            "loss/test": 0.0105,
            "accuracy/test": 0.9 - 1 / 202,
            "seconds": 1.5,
            "images_per_s": 2000,
        }
    )
