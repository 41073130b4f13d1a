"""Scripts written for other MoCo code, running on moco_fast: see docs/migration.md."""
