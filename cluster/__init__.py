"""An edit of many pictures on many ComfyUI servers: `python cluster --help`.

It runs outside ComfyUI, in a Python of its own that has Ray, and speaks plain HTTP to the servers.
"""
