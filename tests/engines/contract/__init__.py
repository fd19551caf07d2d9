"""What the adapters rely on in the engines and in torch, checked against any version of them, installed or not."""
