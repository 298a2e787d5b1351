"""Data: images, pictures on disk, downloads, and the manifest of what ships in `data/`."""

from diffoc.data.images import colour_faces, digits, faces, mnist, portrait

__all__ = ["colour_faces", "digits", "faces", "mnist", "portrait"]
