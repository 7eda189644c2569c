"""study=catalogue"""
