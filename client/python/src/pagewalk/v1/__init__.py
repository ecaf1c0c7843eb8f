"""Messages and stubs of the gRPC package `pagewalk.v1`, generated: see `generate.py`."""
