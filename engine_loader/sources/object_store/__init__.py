"""Object stores as a source: S3, Google Cloud Storage, Azure."""
