"""TensorBoard scalars, written in the calling thread.

`tensorboardX.SummaryWriter` writes from a thread of its own, where a full disk ends in a traceback
and a queue that blocks for good. Here its protocol buffers are framed as TFRecords (length and
data, each with a masked CRC) and appended at once. Each start of a run makes a file that begins
with a session mark, by which TensorBoard drops what an earlier file holds after that step.
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore
from tensorboardX.record_writer import masked_crc32c

from dsv3.reporting.lines import append


class EventFile:
    """An event file in `folder` for steps from `step` on."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{step}"
        self._append(step, file_version="brain.Event:2")
        self._append(step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append(step, summary=Summary(value=entries))

    def _append(self, step: int, **what) -> None:
        append(
            self.path, framed(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        )


def framed(data: bytes) -> bytes:
    """`data` as a TFRecord."""
    length = struct.pack("<Q", len(data))
    crc = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + crc[0] + data + crc[1]
