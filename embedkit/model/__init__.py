"""What a zoo entry is, and what runs it: configuration, preprocess contract, manifest, guard, engines."""
