"""Three calls to the demo server: gRPC with Forno's client, and REST with plain Python.

Usage: `python examples/demo.py [HOST:PORT]`, while `forno serve examples/forno.yaml` runs.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import numpy as np

from forno.client import Client

DATA = Path(__file__).resolve().parent / "data"  # images that no model here was trained on
SHADES = np.array(list(" .:-=+*#@"))


def predict_over_grpc(address: str) -> None:
    """Sends pixels as a tensor."""
    pixels = np.load(DATA / "digits-held-out.npz")["pixels"][:1].astype(np.float32)
    with Client(address) as client:
        prediction = client.predict("digits", {"pixels": pixels})
    print(f'gRPC   client.predict("digits", {{"pixels": ...}})   {pixels.dtype}{list(pixels.shape)}')
    for row in pixels.reshape(8, 8).astype(int) // 2:
        print("         " + "".join(SHADES[row].repeat(2)))
    for name, array in prediction.outputs.items():
        print(f"  ->   {name} = {np.array2string(array, precision=3, suppress_small=True)}")
    print(f"       {prediction.model} version {prediction.version}, {prediction.timings}\n")


def detect_over_rest(address: str) -> None:
    """Sends text as JSON."""
    body = json.dumps({"text": "You have won a free cruise! Call now to claim your prize."})
    print(f"REST   POST /v1/spam/detect   {body}")
    print(f"  ->   {post(address, '/v1/spam/detect', body.encode(), 'application/json')}\n")


def classify_over_rest(address: str) -> None:
    """Sends a picture as it is."""
    picture = (DATA / "digit-7.png").read_bytes()
    print(f"REST   POST /v1/digits/classify   examples/data/digit-7.png, {len(picture)} bytes")
    print(f"  ->   {post(address, '/v1/digits/classify', picture, 'image/png')}\n")


def post(address: str, path: str, body: bytes, content_type: str) -> str:
    """One POST; the answer's body."""
    request = urllib.request.Request(f"http://{address}{path}", body, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def main(address: str) -> None:
    """Makes the calls in turn."""
    predict_over_grpc(address)
    detect_over_rest(address)
    classify_over_rest(address)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8080")
