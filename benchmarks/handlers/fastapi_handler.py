"""A plain FastAPI handler around an ONNX Runtime session: what one writes by hand."""

import sys

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
app = FastAPI()


class Rows(BaseModel):
    data: list[list[float]]


@app.post("/infer")
def infer(rows: Rows) -> dict:
    (answer,) = session.run(None, {"x": np.array(rows.data, np.float32)})
    return {"data": answer.tolist()}


uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
