"""study=contrast"""
