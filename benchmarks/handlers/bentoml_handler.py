"""The same session as a BentoML service: `bentoml serve bentoml_handler:Tiny`, the model's path in TINY_MODEL."""

import os

import bentoml
import numpy as np
import onnxruntime as ort


@bentoml.service(workers=1)
class Tiny:
    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["TINY_MODEL"], options, providers=["CPUExecutionProvider"])

    @bentoml.api
    def infer(self, data: list) -> dict:
        (answer,) = self.session.run(None, {"x": np.array(data, np.float32)})
        return {"data": answer.tolist()}
