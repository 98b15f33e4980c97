"""mosec, as its documentation shows dynamic batching: one stage, a worker per processor, bytes in, JSON out."""

import json
import sys

from classifier import Answer, Classifier
from mosec import Server, Worker
from task import HOST, read_task

TASK = read_task()


class Inference(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = Classifier(TASK)

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[Answer]:
        if TASK.batch == 1:
            return self.classifier.classify([data])[0]
        return self.classifier.classify(data)

    def serialize(self, data: Answer) -> bytes:
        # The default writes indented JSON.
        return json.dumps(data).encode()


def main() -> None:
    sys.argv[1:] = ["--address", HOST, "--port", str(TASK.port), "--log-level", "warning", "--timeout", "30000"]
    server = Server()
    server.append_worker(
        Inference, num=TASK.workers, max_batch_size=TASK.batch, max_wait_time=max(1, round(TASK.wait_ms))
    )
    server.run()


if __name__ == "__main__":
    main()
