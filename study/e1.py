from loop import *
tr=[w for w in CHEAP if half(w)=='train']
V('med.75',form='med_flr',kappa=.7)
V('rms.75',form='rms_flr',kappa=.75)
V('abs',form='med_abs',kappa=1.0,s=.8,power=.75)
V('mix',form='mix',kappa=.9,s=.7,power=.6)
table(tr,[.01,.1,1.,8.],[0],{k:v for k,v in VERS.items()})
