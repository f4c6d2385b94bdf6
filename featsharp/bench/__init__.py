"""Speed and memory of operations, upsamplers and whole encoders, measured where the user is."""
