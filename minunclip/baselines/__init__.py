"""What the paper compares with: GLIDE and DALL-E, in small."""
