"""What people see: plans, reports, tables and pages."""
