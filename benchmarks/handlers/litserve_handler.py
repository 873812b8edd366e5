"""The same session behind LitServe, as its pages show."""

import sys

import litserve
import numpy as np
import onnxruntime as ort


class Api(litserve.LitAPI):
    def setup(self, device):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        return np.array(request["data"], np.float32)

    def predict(self, rows):
        return self.session.run(None, {"x": rows})[0]

    def encode_response(self, answer):
        return {"data": answer.tolist()}


if __name__ == "__main__":
    litserve.LitServer(Api(api_path="/infer"), accelerator="cpu").run(
        port=int(sys.argv[2]), generate_client_file=False, log_level="error"
    )
