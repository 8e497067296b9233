"""What cache methods are made of: sites, schedules, segmentation. The pass that composes them is cache_steps."""
