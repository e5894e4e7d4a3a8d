"""The embedded model `emoji`, in diffusers layout."""
