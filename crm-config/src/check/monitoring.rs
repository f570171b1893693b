//! What the policy says of monitoring: rows of the fault matrix.

use understudy_monitor::matrix::{Guest, Machine, Management, Matrix, Observation, Production, Row, Verdict};

use super::{Checker, Severity};
use crate::policy::Policy;

pub fn check(c: &mut Checker, policy: &Policy) {
    let rows: Vec<Row> = policy.matrix.iter().map(|row| row.get_ref().clone()).collect();
    let (matrix, bad) = match Matrix::with(&rows) {
        Ok(both) => both,
        Err(e) => return c.whole(Severity::Error, e.to_string()),
    };
    for row in bad {
        if let Some(at) = policy.matrix.get(row.index) {
            c.error(at, row.to_string());
        }
    }
    for at in &policy.matrix {
        let row = at.get_ref();
        let serves = |o: &Observation| {
            o.management == Management::Down
                && o.production == Production::Up
                && o.machine == Machine::Running
                && o.guest != Guest::Down
        };
        let kills = |o: Observation| serves(&o) && matrix.row(&o).is_some_and(|r| r.name == row.name);
        if row.verdict == Verdict::FenceAndEvacuate && Observation::all().any(kills) {
            let what = format!(
                "matrix row {} fences hosts whose machines are heard in the production network: they serve until then",
                row.name
            );
            c.warn(at, what);
        }
    }
}
