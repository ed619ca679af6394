"""Small videos, written by PyAV."""

from fractions import Fraction

import av
import numpy as np


def write_film(path, pictures, rate: Fraction = Fraction(25, 2)):
    """Writes pictures, uint8 (height, width, 3), as a video; returns its path. The container goes by the name of the file."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mjpeg", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuvj420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path
