"""What an owner sees and limits: metrics, files about what runs, quotas, the runs on disk, traces."""
