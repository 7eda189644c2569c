"""study=reason_score"""
