"""Ask the served digits what a handwritten nought is: `pip install 'tritonclient[http]'`."""

import sys

import numpy as np
import tritonclient.http as triton

nought = """
    0  0  5 13  9  1  0  0    0  0 13 15 10 15  5  0    0  3 15  2  0 11  8  0    0  4 12  0  0  8  8  0
    0  5  8  0  0  9  8  0    0  4 11  0  1 12  7  0    0  2 14  5 10 12  0  0    0  0  6 13 10  0  0  0"""
digit = (np.array(nought.split(), np.float32) / 16).reshape(1, 1, 8, 8)

address, model = sys.argv[1:] or ("127.0.0.1:8000", "digits")

client = triton.InferenceServerClient(address)
tensor = triton.InferInput("input", [1, 1, 8, 8], "FP32")
tensor.set_data_from_numpy(digit)
answer = client.infer(model, [tensor])
print(answer.as_numpy("output").argmax(), answer.get_response()["parameters"])
