"""An S3 server of moto's, on 127.0.0.1, with one bucket."""

from __future__ import annotations

import logging

import pytest
from moto.server import ThreadedMotoServer

from ekd_ray.remote import lease as leases

# In the environment of clients of the server, and nowhere else.
SECRET, TOKEN = "canary-secret-key-0123456789", "canary-session-token-0123456789"
BUCKET = "studies"


def serve(port=0):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server, *server.get_host_and_port()


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """The environment's variables for a server with an empty bucket `studies`."""
    import pyarrow.fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server, host, port = serve()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIACANARY0123456789",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "EKD_STUDIES_DIR": str(tmp_path / "studies"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    maker = pyarrow.fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
    )
    maker.create_dir(BUCKET)
    yield settings
    maker.delete_dir_contents(BUCKET)
    server.stop()
