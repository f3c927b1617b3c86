//! What is wanted of the settings, as weights, and what a turn costs by them.

use std::str::FromStr;

/// What a turn of one load has come to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Latencies, nanoseconds.
    pub p50: f64,
    /// As above.
    pub p99: f64,
    /// Operations a second.
    pub rate: f64,
    /// CPU time of both sides for one operation, nanoseconds.
    pub cpu: f64,
}

/// How much each thing counts; they add up to one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// Of p50 and, a third as much, p99.
    pub latency: f64,
    /// Of operations a second.
    pub throughput: f64,
    /// Of CPU time for an operation.
    pub cpu: f64,
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> Result<Goal, String> {
        let mut goal = Goal { latency: 0.0, throughput: 0.0, cpu: 0.0 };
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let weight = weight.trim().parse::<f64>().ok().filter(|w| w.is_finite() && *w > 0.0);
            let weight = weight.ok_or_else(|| format!("`{part}`: the weight must be a number above 0"))?;
            let place = match name.trim() {
                "latency" => &mut goal.latency,
                "throughput" => &mut goal.throughput,
                "cpu" => &mut goal.cpu,
                other => {
                    return Err(format!(
                        "`{other}` is no goal: latency, throughput or cpu, with weights as latency=2,cpu=1"
                    ))
                }
            };
            *place += weight;
        }
        let sum = goal.latency + goal.throughput + goal.cpu;
        goal.latency /= sum;
        goal.throughput /= sum;
        goal.cpu /= sum;
        Ok(goal)
    }
}

impl Goal {
    /// The logarithm of what a turn costs: a per cent more of anything counts the same, whatever its unit.
    pub fn log_cost(&self, turn: &Figures) -> f64 {
        let log = |value: f64| value.max(1e-3).ln();
        let latency = 0.75 * log(turn.p50) + 0.25 * log(turn.p99);
        self.latency * latency - self.throughput * log(turn.rate) + self.cpu * log(turn.cpu)
    }

    /// In words.
    pub fn words(&self) -> String {
        let all = [("latency", self.latency), ("throughput", self.throughput), ("cpu", self.cpu)];
        let wanted: Vec<String> =
            all.iter().filter(|(_, w)| *w > 0.0).map(|(name, w)| format!("{name} {:.0} %", w * 100.0)).collect();
        wanted.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_weights() {
        let goal: Goal = "latency=2,cpu=1".parse().expect("a goal");
        assert!((goal.latency - 2.0 / 3.0).abs() < 1e-9 && (goal.cpu - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!("throughput".parse::<Goal>().map(|g| g.throughput), Ok(1.0));
        for wrong in ["", "speed", "latency=0", "latency=x", "cpu=-1", "cpu=inf"] {
            assert!(wrong.parse::<Goal>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_goal_orders_turns_as_it_says() {
        let fast = Figures { p50: 1e3, p99: 2e3, rate: 1e6, cpu: 2e3 };
        let lean = Figures { p50: 9e3, p99: 2e4, rate: 1e5, cpu: 1e3 };
        let cost = |goal: &str, turn| goal.parse::<Goal>().expect("a goal").log_cost(turn);
        assert!(cost("latency", &fast) < cost("latency", &lean));
        assert!(cost("throughput", &fast) < cost("throughput", &lean));
        assert!(cost("cpu", &fast) > cost("cpu", &lean));
        assert!(cost("cpu=9,latency=1", &fast) > cost("cpu=9,latency=1", &lean));
    }
}
