W('K.76',cls=K,kappa=.76)
@dataclass(frozen=True, kw_only=True)
class Less(Posterior):
    less: float = 2.0
    def update(self, b, o):
        b2, q = Posterior.update(self, b, o)
        if not o.progress <= o.until or b2.balance >= 0: return b2, q
        m = b2.centre + self.evidence * o.height * self.less * o.final * b2.balance
        return b2._replace(gain=math.exp(min(max(m, math.log(1e-4)), b2.ceiling))), q
W('L2',cls=Less)
for n in ('follow','until','evidence','noise_weight','smoothing'):
    d=getattr(Posterior(),n)
    W('A.'+n+'.lo',**{n:d/2}); W('A.'+n+'.hi',**{n:min(1.,2*d) if n!='smoothing' else d**.5})
W('A.smoothing.lo',smoothing=.64); W('A.smoothing.hi',smoothing=.89)
@dataclass(frozen=True, kw_only=True)
class Fin(Posterior):
    c: float = 2.5
    def update(self, b, o): return Posterior.update(self, b, o._replace(movement=o.movement * math.sqrt(1 + self.c * o.final)))
W('PF',cls=Fin); W('PFG',cls=Fin,evidence=0.)
VERS['G.400']=S.Setting(controller=Posterior(evidence=0.),rounds=400,probe=False)
VERS['G.25']=S.Setting(controller=Posterior(evidence=0.),rounds=25,probe=False)
W('K1.41',cls=K,kappa=2**.5); W('K2',cls=K,kappa=2.); W('K.71',cls=K,kappa=2**-.5)
STEPS=globals().get('STEPS',{})
if not hasattr(S,'_patched'):
    S._patched=True; _R0=S._Replicas
    class R3(_R0):
        def __init__(s,workload,*a,**k):
            super().__init__(workload,*a,**k); STEPS['n']=s._steps
    S._Replicas=R3
@dataclass(frozen=True, kw_only=True)
class Len(Posterior):
    c: float = 2.5
    delta: float = 1/3
    t0: float = 700.
    def update(self, b, o):
        k=(STEPS['n']/self.t0)**self.delta/math.sqrt(1+self.c*o.final)
        return Posterior.update(self, b, o._replace(movement=o.movement/k))
W('PL',cls=Len); W('PLG',cls=Len,evidence=0.,probe=False)
for n in ('follow','until','evidence','noise_weight','smoothing'):
    d=getattr(Posterior(),n)
    W('B.'+n+'.lo',cls=Len,**{n:d/2}); W('B.'+n+'.hi',cls=Len,**{n:min(1.,2*d) if n!='smoothing' else .89})
W('B.smoothing.lo',cls=Len,smoothing=.64)
@dataclass(frozen=True, kw_only=True)
class Walk(Posterior):
    c: float = 2.5
    tau: float = 5.
    two: float = 2.
    def update(self, b, o):
        n=max(1.,round(STEPS['n']*o.share)); f=1-self.tau/n*(1-math.exp(-n/self.tau))
        k=math.sqrt(self.two*f/(1+self.c*o.final))
        return Posterior.update(self, b, o._replace(movement=o.movement/k))
W('PN',cls=Walk); W('PNG',cls=Walk,evidence=0.,probe=False)
for n in ('follow','until','evidence','noise_weight','smoothing'):
    d=getattr(Posterior(),n)
    W('B.'+n+'.lo',cls=Walk,**{n:d/2}); W('B.'+n+'.hi',cls=Walk,**{n:min(1.,2*d) if n!='smoothing' else .89})
W('B.smoothing.lo',cls=Walk,smoothing=.64)
VERS['PNG.400']=S.Setting(controller=Walk(evidence=0.),rounds=400,probe=False)
VERS['PNG.25']=S.Setting(controller=Walk(evidence=0.),rounds=25,probe=False)
