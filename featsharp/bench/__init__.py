"""Speed and memory of operations, upsamplers and whole encoders, measured on the user's machine."""
