"""From a described file to a resident layer: conventions, findings, loading, residency, the store, conversion."""
