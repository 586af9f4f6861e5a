"""The bundled demo data: OpenMoji images and texts."""
