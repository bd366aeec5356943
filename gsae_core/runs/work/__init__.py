"""What a background process does: train, index, transfer, import, publish."""
