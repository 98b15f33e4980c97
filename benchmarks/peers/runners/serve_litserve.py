"""LitServe, as its documentation shows batching: decode_request, batch, predict, unbatch, encode_response.

Kinder than the documentation in one place: the body is the image itself instead of base64 in JSON.
"""

from typing import Annotated

import litserve
import numpy as np
from classifier import Answer, Classifier
from fastapi import Body
from task import HOST, read_task

TASK = read_task()


class API(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier(TASK)

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> np.ndarray:
        return self.classifier.decode(request)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.classifier.infer(x if TASK.batch > 1 else x[None])

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> Answer:
        return self.classifier.answer(output if TASK.batch > 1 else output[0])


def main() -> None:
    api = API(max_batch_size=TASK.batch, batch_timeout=TASK.wait_ms / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=TASK.workers, fast_queue=True)
    server.run(
        host=HOST,
        port=TASK.port,
        num_api_servers=TASK.fronts or 1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main()
