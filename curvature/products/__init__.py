"""Matrix-free products over a data loader, estimates and spectra from them, and views for other libraries."""
