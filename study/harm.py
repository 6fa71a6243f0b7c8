from report import *
for w in sorted({k[0] for k in done()}):
    r=excess(w,1.0,'PP',range(5)) if (any(k[0]==w and k[3]=='PP' for k in done())) else None
    if r: print(f"{w} {r[0]:+.1f} (n={r[2]})", end='; ')
