"""Runs gcp-storage-emulator with an empty bucket: python gcs_emulator.py PORT.

TensorStore needs some features of Google Cloud Storage that the emulator lacks. They are added here.
"""

import sys

from gcp_storage_emulator.handlers import objects

download, ls = objects.download, objects.ls


def download_with_generation(request, response, storage, *args, **kwargs):
    """Adds the object's generation, and ranges that count from the end."""
    bucket, name = request.params["bucket_name"], request.params["object_id"]
    if name in storage.objects.get(bucket, {}):
        found, header = storage.get_file_obj(bucket, name), request.get_header
        response["X-Goog-Generation"] = found["generation"]

        def range_from_the_start(key, default=None):
            value = header(key, default)
            if key == "range" and value and value.startswith("bytes=-"):
                return f"bytes={max(0, int(found['size']) - int(value[7:]))}-{int(found['size']) - 1}"
            return value

        request.get_header = range_from_the_start
    return download(request, response, storage, *args, **kwargs)


def list_between_names(request, response, storage, *args, **kwargs):
    """Adds listings between two names, without which deleting a folder would delete the whole bucket."""
    start, end = (request.query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
    answer = response.json

    def filtered(found):
        items = found.get("items", [])
        answer({**found, "items": [item for item in items if start <= item["name"] < (end or chr(0x10FFFF))]})

    response.json = filtered
    return ls(request, response, storage, *args, **kwargs)


objects.download, objects.ls = download_with_generation, list_between_names
# The server's table of handlers is built when it is imported, so it is imported after the handlers are replaced.
from gcp_storage_emulator.server import create_server  # noqa: E402

create_server("127.0.0.1", int(sys.argv[1]), True, "bucket").run()
