"""What scripts written for other MoCo code import, answered by this library: docs/migration.md."""
