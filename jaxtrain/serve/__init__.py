"""An exported model as an HTTP service: ``python -m jaxtrain serve --model FILE`` (extra ``serve``).

``batcher`` joins requests to batches, ``model`` runs them, ``protocol`` reads and writes the JSON of the Open
Inference Protocol, ``app`` is the ASGI application, ``guard`` what every request passes, and ``server`` the
socket, the signals and the start.
"""
