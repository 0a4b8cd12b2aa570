"""The stages of `gpu_session.py`: each module has a function that takes the session and writes rows."""
