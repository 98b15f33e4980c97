"""The model of Triton's Python backend: a batch of encoded images in, one JSON answer for each out."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from classifier import Classifier
from task import read_task


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.classifier = Classifier(read_task())

    def execute(self, requests: list["pb_utils.InferenceRequest"]) -> list["pb_utils.InferenceResponse"]:
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)[0] for request in requests]
        return [response(json.dumps(answer).encode()) for answer in self.classifier.classify(images)]


def response(answer: bytes) -> "pb_utils.InferenceResponse":
    return pb_utils.InferenceResponse([pb_utils.Tensor("answer", np.array([[answer]], np.object_))])
