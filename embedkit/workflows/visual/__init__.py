"""What people look at: thumbnails, contact sheets, the atlas."""
