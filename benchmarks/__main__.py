"""`scripts/bench` lists the benchmarks; `scripts/bench NAME ...` runs some and writes them to results.md."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "vit": ("benchmarks.cases", "the ViT on MNIST, batch 1, against every single tool"),
    "resnet": ("benchmarks.cases", "ResNet-56 on CIFAR-10, batch 1, against every single tool"),
    "text-1": ("benchmarks.cases", "a transformer text classifier, batch 1"),
    "text-32": ("benchmarks.cases", "a transformer text classifier, batch 32"),
    "lstm-1": ("benchmarks.cases", "an LSTM, batch 1"),
    "lstm-32": ("benchmarks.cases", "an LSTM, batch 32"),
    "vit-heal": ("benchmarks.cases", "the ViT with all its training data, at least 10 times as fast"),
    "resnet-heal": ("benchmarks.cases", "ResNet-56 with all its training data, at least 20 times as fast"),
    "spoken": ("benchmarks.cases", "a convnet on spectrograms of spoken digits, trained here, batch 1"),
    "sst2": ("benchmarks.cases", "a transformer on film reviews, trained here, batch 1"),
    "ett": ("benchmarks.cases", "a forecaster of a transformer's temperature, trained here, batch 1"),
    "refresh": ("benchmarks.refresh", "the ViT's bundle with retrained weights, against the search that made it"),
    "fft": ("benchmarks.fft", "a long convolution by FFT against the direct form of every runtime"),
    "sparse": ("benchmarks.sparse", "products that skip zeros against dense ones, at 90, 95 and 99 % zeros"),
    "judge": ("benchmarks.judge", "how often the judge errs: equals called faster, planted losses missed"),
    "governor": ("benchmarks.governor", "the governor against other policies, simulated"),
    "watching": ("benchmarks.watching", "how soon the quality watch finds a rung that went bad, simulated"),
    "serve": ("benchmarks.serve", "the governor and the server on a real ladder, every figure"),
    "requests": ("benchmarks.requests", "requests per second over HTTP, against handlers around the same session"),
    "imports": ("benchmarks.imports", "what importing costs, and what comes along"),
    "overhead": ("benchmarks.overhead", "fast(x) over the raw session's own call"),
}


def main() -> None:
    names = sys.argv[1:]
    if not names or any(n not in BENCHMARKS for n in names):
        for name, (_, what) in BENCHMARKS.items():
            print(f"{name:12} {what}")
        if names:
            sys.exit(f"\nno such benchmark: {', '.join(n for n in names if n not in BENCHMARKS)}")
        return
    for name in names:
        importlib.import_module(BENCHMARKS[name][0]).run(name)


if __name__ == "__main__":
    main()
