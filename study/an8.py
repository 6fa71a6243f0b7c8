from an2 import *
def traj(run):
    fl=[math.sqrt(s[0]/3) for s in run['shapes']]; out=[]
    area=.506
    for p,h,loss,row,*_ in run['rows']:
        d=[math.sqrt(r[0])+1e-12 for r in row]; N=[max(math.sqrt(r[1]),b) for r,b in zip(row,fl)]
        m=med([a/math.sqrt(b*f) for a,b,f in zip(d,N,fl)]); out.append(math.log(m/math.sqrt(max(h,.001)*run['rows'][0][0]/area)))
    return out
if __name__=='__main__':
    ps=[0,1,2,3,4,6,8,10,12,15,18,22,26,30,35,40,50,60,70,80,90]
    print('round      ',' '.join(f'{p+1:5d}' for p in ps))
    allm=[]
    for w in ws:
        for r in by.get((w,1.0),[])[:1]:
            t=traj(r); sc=len(t)/100
            print(f'{w:12s}',' '.join(f'{t[min(len(t)-1,int(p*sc))]:+5.2f}' for p in ps)); allm.append([t[min(len(t)-1,int(p*sc))] for p in ps])
    a=np.array(allm[:20]); print('mean        ',' '.join(f'{v:+5.2f}' for v in a.mean(0))); print('sd          ',' '.join(f'{v:5.2f}' for v in a.std(0)))
