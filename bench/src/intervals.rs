//! How sure one can be of a ratio: intervals from repeated rounds, on logarithms, by Student's t.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// A ratio with its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The lower end.
    pub low: f64,
    /// The best guess.
    pub middle: f64,
    /// The upper end.
    pub high: f64,
}

impl Interval {
    /// Whether all of it lies above a ratio.
    pub fn above(&self, ratio: f64) -> bool {
        self.low > ratio
    }

    /// Whether all of it lies below a ratio.
    pub fn below(&self, ratio: f64) -> bool {
        self.high < ratio
    }
}

/// Mean and its variance, of logarithms; `None` of fewer than two values, or values that have none.
pub fn log_mean(values: &[f64]) -> Option<(f64, f64)> {
    let logs: Vec<f64> = values.iter().map(|v| v.ln()).collect();
    if logs.len() < 2 || logs.iter().any(|l| !l.is_finite()) {
        return None;
    }
    let n = logs.len() as f64;
    let mean = logs.iter().sum::<f64>() / n;
    let variance = logs.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / (n - 1.0);
    // Clocks are coarse: rounds that are all the same are not free of error.
    Some((mean, (variance / n).max(1e-12)))
}

/// How far Student's t goes at a confidence, both ends together.
pub fn reach(confidence: f64, freedom: f64) -> f64 {
    let t = StudentsT::new(0.0, 1.0, freedom.max(1.0));
    t.map_or(f64::INFINITY, |t| t.inverse_cdf(0.5 + confidence / 2.0))
}

/// The ratio of `new` to `old`, of rounds that were measured apart (Welch), where two runs of the same thing differ by
/// `between` (a variance of logarithms) all by themselves.
pub fn apart(new: &[f64], old: &[f64], between: f64, confidence: f64) -> Option<Interval> {
    let (a, va) = log_mean(old)?;
    let (b, vb) = log_mean(new)?;
    let (na, nb) = (old.len() as f64, new.len() as f64);
    let freedom = (va + vb).powi(2) / (va * va / (na - 1.0) + vb * vb / (nb - 1.0));
    Some(around(b - a, (va + vb + between).sqrt() * reach(confidence, freedom)))
}

/// The ratio of `new` to `old`, of rounds that were measured beside each other.
pub fn paired(new: &[f64], old: &[f64], confidence: f64) -> Option<Interval> {
    let ratios: Vec<f64> = new.iter().zip(old).map(|(new, old)| new / old).collect();
    let (mean, variance) = log_mean(&ratios)?;
    Some(around(mean, variance.sqrt() * reach(confidence, ratios.len() as f64 - 1.0)))
}

fn around(middle: f64, far: f64) -> Interval {
    Interval { low: (middle - far).exp(), middle: middle.exp(), high: (middle + far).exp() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_tables() {
        // t at 97.5 % one-sided: 12.706 with one degree of freedom, 2.776 with four.
        assert!((reach(0.95, 1.0) - 12.706).abs() < 0.01 && (reach(0.95, 4.0) - 2.776).abs() < 0.01);
        let same = apart(&[100.0, 102.0, 98.0], &[101.0, 99.0, 100.0], 0.0, 0.95).expect("rounds");
        assert!(!same.above(1.0) && !same.below(1.0), "{same:?}");
        let faster = apart(&[120.0, 122.0, 119.0], &[101.0, 99.0, 100.0], 0.0, 0.95).expect("rounds");
        assert!(faster.above(1.0) && (faster.middle - 1.2).abs() < 0.02, "{faster:?}");
        let unsure = apart(&[120.0, 122.0, 119.0], &[101.0, 99.0, 100.0], 0.02, 0.95).expect("rounds");
        assert!(!unsure.above(1.0), "machines that differ by 14 % say nothing of 20 %: {unsure:?}");
        assert_eq!(apart(&[1.0], &[1.0, 2.0], 0.0, 0.95), None);
        assert_eq!(log_mean(&[0.0, 1.0]), None);
    }

    #[test]
    fn what_is_paired_ignores_what_all_share() {
        let old = [100.0, 50.0, 200.0, 80.0];
        let new = old.map(|v| v * 1.05);
        let tight = paired(&new, &old, 0.95).expect("rounds");
        assert!(tight.above(1.04) && tight.below(1.06), "{tight:?}");
    }
}
