"""What dApps and service authors import."""
