"""Images to look at: `thumbnails`, the `contact_sheet`, and the `atlas` (a map), colored by `groups`."""
